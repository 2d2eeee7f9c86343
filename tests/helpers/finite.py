"""Looks for NaN and Inf in trained parameters."""

from torch import nn

from lightning_modules.checkpoint.weights import finite_everywhere


def all_finite(module: nn.Module) -> bool:
    """Returns whether all trained parameters are finite on all ranks. All ranks must call it."""
    return finite_everywhere(p.detach() for p in module.parameters() if p.requires_grad)
