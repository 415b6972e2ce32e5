"""The demo: two small real language models, a gateway, sample queries and where each went."""
