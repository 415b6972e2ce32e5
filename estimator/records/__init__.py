"""The records of served requests: their types and the database they are stored in."""
