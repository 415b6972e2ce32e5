"""Learns: outcome tables, estimator fits, evaluations, RL runs and refreshes from served traffic."""
