"""A run directory: what was there before, and what a command may write into it."""
