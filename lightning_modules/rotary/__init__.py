"""Rotary schemes: which position each token has, and which axis each frequency reads.

One file per scheme, and `base` with the contract.
"""
