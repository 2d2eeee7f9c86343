"""Scores of a needle test, with a prefix that is read once for all needles."""
