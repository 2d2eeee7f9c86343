"""The stream of samples: their order, and the reading of their bytes.

The order is a function of shards, seed and epoch. It does not depend on ranks or workers.
"""
