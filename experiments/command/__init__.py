"""What was typed: overrides as values, names made of them, errors in one line."""
