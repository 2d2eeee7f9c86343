"""Runs encoder layers on a few frames at a time when no gradient is needed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

#: Default of `model.encoder.chunk_frames`. In a CLIP-L at 336 pixels, 16 frames are 9,232 tokens.
#: That is enough to fill a GPU; more frames only take more memory.
CHUNK_FRAMES = 16


def check_chunk_frames(size: int | None) -> int | None:
    """Returns `size` if it is valid.

    Raises:
        ValueError: `size` is less than 1.
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
    """Runs `start` and then the layers on frames that do not attend to each other.

    Without gradients, `size` frames run at a time. Only those frames need normalised copies and the
    wide activations of a layer, and the result of each layer overwrites its input. With gradients,
    all activations are kept anyway, so all frames run at once.

    The outer loop is over layers, not over chunks, because of FSDP2. Its ranks gather the weights
    of a layer together, but a rank with more frames has more chunks. So each layer is gathered
    once before its first chunk, and resharded after its last chunk.

    Args:
        start: maps frames to the input of the first layer.
        reads: the modules whose parameters `start` reads.
        size: frames per chunk; None: all frames at once.
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
    """Returns `run(rows)`, computed on `size` rows at a time.

    The results are written into `into` if the dtype fits. `into` may be `rows` itself, because each
    chunk is read before it is written.
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
