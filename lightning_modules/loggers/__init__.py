"""Loggers that continue the same files and the same W&B run after a kill, and progress lines."""
