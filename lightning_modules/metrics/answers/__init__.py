"""Asks a model for answers, and reads option or yes and no from them."""
