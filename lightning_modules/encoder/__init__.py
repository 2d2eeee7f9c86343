"""Encoders: vision towers that turn frames into patch features.

There is one file per model family; `base` holds the contract.
"""
