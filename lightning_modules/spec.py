"""Builds the components of a model from their specs, and sets their attention.

Only classes that this package defines are built, because a spec may come from the `config.json` of
a stranger's model: see `datamodules.common.spec`.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from datamodules.common import spec as specs

PACKAGE = "lightning_modules"


def build(spec: Mapping[str, Any], kind: type = object) -> Any:
    """Builds a component, after the components in it. Raises errors as `datamodules` does.

    Args:
        kind: required base class; for components inside it is `nn.Module`.
    """
    return specs.build(spec, PACKAGE, kind, nested=nn.Module)


def spec_of(component: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Returns the spec from which `build` makes another component of this class."""
    return {"_target_": f"{type(component).__module__}.{type(component).__qualname__}", **arguments}


def set_attention(model: PreTrainedModel, stage: str, attention: str) -> None:
    """Selects the attention implementation of `model`: sdpa, eager, flash_attention_2, …

    Raises:
        ValueError: transformers does not know the name, its package is missing, or the model does
            not support it.
    """
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("Specified ")
        raise ValueError(f"model.{stage}.attention={attention} cannot be used: {reason}") from None
