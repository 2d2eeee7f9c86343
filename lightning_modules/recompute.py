"""Activation checkpointing: recomputes results in the backward pass instead of keeping them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_again: ContextVar[bool] = ContextVar("_again", default=False)


def made_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Returns `function(*arguments)`, and keeps only the arguments for the backward pass.

    Gradients are bit-for-bit the same: the same operations run on the same numbers, with the same
    random state.
    """

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _running_again()

    made: Any = checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
    return made


def is_running_again() -> bool:
    """Returns whether a recomputation of `made_again` is running; hooks saw its values before."""
    return _again.get()


@contextmanager
def _running_again() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
