"""Rows of all ranks in one tensor, through which gradients flow back to where each row is from.

PyTorch has such a function under one name up to 2.12 and another from 2.13 on, and warns of the
first; these two collectives are the same in all.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ranks = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(ranks, own.contiguous())
        return torch.cat(ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather(own: Float[Tensor, "b e"]) -> Float[Tensor, "all e"]:
    """Rows of all ranks, rank by rank, as many of each; without ranks `own` itself.

    All ranks must ask, and all must go back: the gradient of a row is the sum of those that the
    losses of all ranks have for it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    return _Gather.apply(own)
