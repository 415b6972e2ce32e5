"""Verifiers, which grade answers against a reference, and the worker processes they run in."""
