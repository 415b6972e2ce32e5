"""Common ground of serving and learning: the difficulty estimator, its checkpoints and records."""
