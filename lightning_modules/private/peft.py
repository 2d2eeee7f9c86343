"""Private names of peft."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

#: The replaced linear inside a layer with LoRA. It is part of the names of parameters.
BASE_LAYER = "base_layer"


@contextmanager
def disabled(layers: Sequence[Any]) -> Iterator[None]:
    """Disables the adapters of these layers inside the context.

    peft's `enable_adapters` is not used, because it also turns `requires_grad` off. A sharded
    weight that is first gathered inside this context would then never be trained.
    """
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
