"""How the demo's two language models were made."""
