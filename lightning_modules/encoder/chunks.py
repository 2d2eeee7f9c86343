"""Frames run a few at a time where no gradient is asked for."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

#: Frames at a time, unless `model.encoder.chunk_frames` says otherwise. In a CLIP-L at 336 pixels
#: these are 9,232 tokens, enough for a GPU; more only takes more memory.
CHUNK_FRAMES = 16


def check_chunk_frames(size: int | None) -> int | None:
    """
    Raises:
        ValueError: there is no such number of frames.
    """
    if size is not None and size < 1:
        raise ValueError(
            f"model.encoder.chunk_frames is {size}: set a number of frames, or null for all at once"
        )
    return size


def run_layers(
    start: Callable[[Tensor], Tensor],
    reads: Iterable[nn.Module],
    layers: nn.ModuleList,
    frames: Num[Tensor, "n c h w"],
    size: int | None,
) -> Float[Tensor, "n s d"]:
    """`start`, then the layers, over frames that do not see one another.

    Where no gradient is asked for, `size` frames run at a time: the normalised copies of frames and
    the wide activations of a layer exist for these alone, and each layer's result takes the place
    of its input. Where a gradient is asked for, all of it is kept anyway, and all frames run at
    once.

    It is layer by layer, and not chunk by chunk, for FSDP2: its ranks gather the weights of a layer
    together, and a rank with more frames has more chunks. So a layer is gathered once, before its
    first chunk, and let go after its last one.

    Args:
        start: from frames to what the first layer reads.
        reads: the modules whose parameters `start` reads.
        size: None: all frames at once.
    """
    learns = frames.requires_grad or any(
        parameter.requires_grad for module in (*reads, *layers) for parameter in module.parameters()
    )
    asked = torch.is_grad_enabled() and learns
    size = len(frames) if asked or size is None else size
    with torch.set_grad_enabled(asked):
        hidden = _in_chunks(start, frames, size)
        if not len(frames):  # transformers' attention does not take an empty batch
            return hidden
        for layer in layers:
            with nullcontext() if asked else _gathered_once(layer):
                hidden = _in_chunks(lambda part, run=layer: run(part, None), hidden, size, hidden)
    return hidden


def _in_chunks(
    run: Callable[[Tensor], Tensor], rows: Tensor, size: int, into: Tensor | None = None
) -> Tensor:
    """`run(rows)`, `size` rows at a time; the results are written into `into` if it can hold them.

    It may be `rows` itself, as each chunk is read before it is written.
    """
    if len(rows) <= size:
        return run(rows)
    for first in range(0, len(rows), size):
        made = run(rows[first : first + size])
        if into is None or into.dtype != made.dtype:
            into = made.new_empty(len(rows), *made.shape[1:])
        into[first : first + size] = made
    assert into is not None
    return into


@contextmanager
def _gathered_once(layer: nn.Module) -> Iterator[None]:
    """Keeps the weights of a sharded layer gathered between its calls."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        layer.set_reshard_after_forward(True, recurse=False)
        layer.reshard()
