"""Vision towers: frames become patch features.

One file per family, and `base` with the contract.
"""
