"""The rules by which prompts are chosen, one a file."""
