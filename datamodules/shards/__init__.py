"""Writes shards from videos and annotations.

Training needs none of this.
"""
