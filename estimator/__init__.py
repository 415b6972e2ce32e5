"""Shared by serving and learning: the difficulty estimator, its checkpoints and the records of served traffic."""
