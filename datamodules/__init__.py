"""Reads shards and makes batches from them.

Each datamodule is one file here. The rooms below hold the parts that datamodules share.
"""
