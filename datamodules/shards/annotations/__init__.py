"""Reads annotation files of many projects into the one form of shards."""
