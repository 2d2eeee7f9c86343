"""Rotary schemes: the position of each token, and the axis that each frequency reads.

There is one file per scheme; `base` holds the contract.
"""
