"""Judges, which score answers; the table of label sources; and the retrying client that asks pools and webhooks."""
