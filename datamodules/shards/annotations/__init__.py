"""Reads annotation files of many projects and converts them into the format of shards."""
