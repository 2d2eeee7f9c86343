"""Gathers the rows of all ranks in one tensor; gradients flow back to the rank of each row.

PyTorch has such a function, but under one name up to 2.12 and another from 2.13 on, with a warning
for the first. The two collectives used here are the same in all versions.
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
    """Returns the rows of all ranks, rank by rank; in a single process, returns `own`.

    Each rank must have the same number of rows. All ranks must call this function, and all must run
    the backward pass: the gradient of a row is the sum of its gradients from the losses of all
    ranks.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    return _Gather.apply(own)
