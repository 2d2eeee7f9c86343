"""Poolers: turn patch features into fewer visual tokens.

There is one file per method; `base` holds the contract.
"""
