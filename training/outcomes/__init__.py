"""Outcome tables and labels: reading, collecting, and turning served records into examples."""
