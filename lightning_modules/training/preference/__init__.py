"""Preference tuning: pairs of answers, their loss, and the reference model."""
