"""Fewer tokens: patch features become visual tokens.

One file per method, and `base` with the contract.
"""
