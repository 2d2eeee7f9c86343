"""What programs share of a run: composing it, its processes, its lock, reading it again."""
