"""Code for runs that the programs share: composing, processes, the lock, and reading results."""
