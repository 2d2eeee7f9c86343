"""Checks of a command before anything is written."""
