"""Preference tuning on pairs of answers: the module, the losses and the reference model."""
