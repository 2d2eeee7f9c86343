"""Forecasts memory, FLOPs and hours of a recipe without running it."""
