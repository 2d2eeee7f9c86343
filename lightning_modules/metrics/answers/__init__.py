"""Generates answers with a model, and parses an option letter or yes/no from them."""
