"""The model, its components, and everything that trains and scores it."""
