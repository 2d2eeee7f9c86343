"""Scores of a needle test, with a prefix cache that is shared by all needles."""
