"""Serves: OpenAI-compatible requests, routed by an estimator to the cheapest pool expected to answer well enough."""
