"""Serves: OpenAI-compatible requests, routed by an estimator to the cheapest pool that will do."""

__version__ = "0.1.0"
