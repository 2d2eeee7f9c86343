"""Runs encoder layers on a few frames at a time when no gradient is needed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    Without gradients, `size` frames run at a time: see `run_chunks`.

    Args:
        start: maps frames to the input of the first layer.
        reads: the modules whose parameters `start` reads.
        size: frames per chunk; None: all frames at once.
    """
    asked = needs_gradient([frames], [*reads, *layers])
    chunks = (frames,) if asked or size is None else frames.split(size)
    if not len(frames):  # transformers' attention does not take an empty batch
        layers = layers[:0]
    return run_chunks(
        lambda n: start(chunks[n]),
        list(map(len, chunks)),
        layers,
        lambda layer, hidden, _: layer(hidden, None),
        asked,
    )


def needs_gradient(inputs: Iterable[Tensor], modules: Iterable[nn.Module]) -> bool:
    """Returns whether gradients are on, and an input or a parameter of a module asks for one."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return torch.is_grad_enabled() and any(each.requires_grad for each in (*inputs, *parameters))


def run_chunks(
    start: Callable[[int], Tensor],
    counts: Sequence[int],
    layers: Iterable[nn.Module],
    call: Callable[[nn.Module, Tensor, int], Tensor],
    asked: bool,
) -> Float[Tensor, "n *s d"]:
    """Runs `start` and then the layers on chunks of rows that do not attend to each other.

    Only the rows of one chunk need normalised copies and the wide activations of a layer, and the
    result of each layer overwrites its input. With gradients, all activations are kept anyway, so
    the caller makes one chunk of all rows.

    The outer loop is over layers, not over chunks, because of FSDP2. Its ranks gather the weights
    of a layer together, but a rank with more frames has more chunks. So each layer is gathered
    once before its first chunk, and resharded after its last chunk.

    Args:
        start: maps the number of a chunk to its input of the first layer.
        counts: rows of each chunk.
        call: runs a layer on the rows of a chunk; the last argument is the number of the chunk.
        asked: whether gradients are needed; then there is one chunk.
    """
    with torch.set_grad_enabled(asked):
        hidden = _in_chunks(lambda n, _: start(n), counts)
        for layer in layers:
            with nullcontext() if asked else _gathered_once(layer):
                hidden = _in_chunks(
                    lambda n, rows, run=layer, read=hidden: call(run, read[rows], n), counts, hidden
                )
    return hidden


def _in_chunks(
    run: Callable[[int, slice], Tensor], counts: Sequence[int], into: Tensor | None = None
) -> Tensor:
    """Returns the results of `run` for all chunks; `run` gets a chunk's number and its rows.

    The results are written into `into` if the dtype fits. `into` may be what `run` reads, because
    each chunk is read before it is written.
    """
    if len(counts) == 1:
        return run(0, slice(None))
    first = 0
    for number, count in enumerate(counts):
        rows = slice(first, first + count)
        made = run(number, rows)
        if into is None or into.dtype != made.dtype:
            into = made.new_empty(sum(counts), *made.shape[1:])
        into[rows] = made
        first += count
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
