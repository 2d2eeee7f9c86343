"""Starts jobs from a process that has imported PyTorch, so that they share its imports.

`template.py` is that process. `forks.py` is the launcher's side of it.
"""

#: Most bytes of a message between them. A request has a command line and a few variables.
MESSAGE_BYTES = 65536
