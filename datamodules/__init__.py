"""Reads shards and makes batches of them.

A datamodule lies here as one file. The rooms below hold its parts.
"""
