"""Generates answers with a model, and parses an option letter or yes/no from them."""

#: Name of the condition under which the model sees the whole batch. Another is `blind`.
FULL = "full"
