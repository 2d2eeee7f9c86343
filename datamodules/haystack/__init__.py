"""Needle tests: long videos in which one frame answers the question.

The datamodule lays out the cells; the metrics score the answers.
"""
