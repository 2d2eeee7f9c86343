"""The run directory: its earlier run, and what a command may write into it."""
