"""Judges, which score answers without a reference, and the client that asks the pools."""
