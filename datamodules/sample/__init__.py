"""The parts of one sample: its conversation, its tokens, its question.

Nothing here depends on the order of samples.
"""
