"""One sample: its conversation, its tokens, its question.

Nothing here knows which sample comes next.
"""
