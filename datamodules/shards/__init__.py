"""Writes shards from videos and annotations.

Training does not use these modules.
"""
