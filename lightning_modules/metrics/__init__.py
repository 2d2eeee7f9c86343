"""Turns what validation saw into numbers with names.

Each sample counts once, however it was batched and shared.
"""
