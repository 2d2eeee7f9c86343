"""Scalings of rotary frequencies, for rows that are longer than in training.

Each one goes with every rotary scheme, because it sees only frequencies and the axis of each.
"""
