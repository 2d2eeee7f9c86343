"""The command line: reads overrides as values, names runs by them, and checks values."""
