"""Shared by serving and learning: the difficulty estimator, its checkpoints and the records of served traffic."""

import os

# ONNX Runtime 1.29 and newer report models and usage to Microsoft unless this is set before it starts.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
