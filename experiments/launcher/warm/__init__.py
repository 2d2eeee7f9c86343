"""Starts jobs from a process that has imported PyTorch, so that they share its imports.

`template.py` is that process. `forks.py` is the launcher's side of it.
"""
