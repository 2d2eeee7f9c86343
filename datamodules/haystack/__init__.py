"""Needle tests: long videos with one frame that a question asks for.

The datamodule lays out the cells; the metrics score the answers.
"""
