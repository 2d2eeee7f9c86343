"""Loggers that go on with the same files and the same W&B run after a kill."""
