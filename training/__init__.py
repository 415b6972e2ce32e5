"""Learns: outcome tables, fits, evaluations and refreshed checkpoints of the estimator."""
