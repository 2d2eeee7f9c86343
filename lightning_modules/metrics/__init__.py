"""Scores: turn validation results into named numbers.

Each sample counts once, for any batching and any number of ranks.
"""
