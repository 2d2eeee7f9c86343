"""Which sample comes next, and where its bytes come from.

The order is a function of shards, seed and epoch, whatever the ranks and workers.
"""
