"""Private names of transformers that training uses."""

from typing import Any


def attention_of(config: Any) -> str:
    """Returns the attention implementation that a model runs with, such as sdpa."""
    return config._attn_implementation
