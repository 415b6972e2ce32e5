"""The endpoints that serve models: one `Api` each (api.py), listed in apis.py; and what they share."""
