"""Results that are made again in the backward pass instead of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_again: ContextVar[bool] = ContextVar("_again", default=False)


def made_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which only the arguments are kept for the backward pass.

    Gradients are the same to the last bit: the same operations run on the same numbers, and random
    ones are drawn again as they were.
    """

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _running_again()

    made: Any = checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
    return made


def is_running_again() -> bool:
    """Whether `made_again` is making something for the second time: hooks have seen it before."""
    return _again.get()


@contextmanager
def _running_again() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
