"""The model, its components, and how it is trained and scored."""
