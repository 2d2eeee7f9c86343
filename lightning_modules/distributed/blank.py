"""A blank visual for batches without visuals, so that every rank runs every visual component.

Ranks reduce gradients together, and gather sharded weights together. If one rank has visuals, the
others must run the same blocks and give each weight a gradient, even if it is zero. A single
process does the same, so that its optimizer takes the same steps.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from lightning_modules.encoder.base import Encoder


def always_encode(encoder: Encoder) -> None:
    """Makes the encoder read a blank visual where a batch has none, in training or in shards.

    Its tokens have no slot. The model gives them no place in a row, and a weight of 0.
    """
    encoder.register_forward_pre_hook(_fill_in)


def _fill_in(encoder: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if args[0] or not (torch.is_grad_enabled() or _is_sharded(encoder)):
        return None
    blank = encoder.blank()
    device = next(encoder.parameters()).device
    return ([replace(blank, frames=blank.frames.to(device))], *args[1:])


def _is_sharded(encoder: Encoder) -> bool:
    return any(isinstance(block, FSDPModule) for block in encoder.blocks())
