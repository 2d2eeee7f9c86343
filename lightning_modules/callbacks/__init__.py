"""Callbacks that run beside a training: logs, guards and status files."""
