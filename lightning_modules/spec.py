"""Builds a component from its spec: a class path under `_target_`, and the arguments beside it.

A spec comes from a YAML file of `configs/<component>/`, or from the `config.json` of a saved
model. Opening a stranger's checkpoint must not run the stranger's code. Therefore only classes
that this package defines are built; all others are refused before they are imported.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PACKAGE = "lightning_modules"


def resolve(path: Any, kind: type = object) -> type:
    """Returns the class at a dotted path under `lightning_modules`.

    Args:
        kind: required base class.

    Raises:
        ValueError: the path is outside this package, or does not name a subclass of `kind` that
            this package defines.
    """
    module_path, _, name = str(path).rpartition(".")
    if not module_path.startswith(f"{PACKAGE}."):
        raise ValueError(f"stage class {path!r} refused: only classes under {PACKAGE} are built")
    try:
        found = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no stage class {path!r}") from error
    if not isinstance(found, type) or not found.__module__.startswith(f"{PACKAGE}."):
        raise ValueError(f"stage class {path!r} refused: not a class defined under {PACKAGE}")
    if not issubclass(found, kind):
        raise ValueError(f"stage class {path!r} refused: it is no {kind.__name__}")
    return found


def build(spec: Mapping[str, Any], kind: type = object) -> Any:
    """Calls the class under `_target_` with the other keys as arguments; builds nested specs first.

    Args:
        kind: required base class; for nested specs it is `nn.Module`.

    Raises:
        ValueError: `_target_` is missing, the class is refused, or it does not take the arguments.
    """
    if "_target_" not in spec:
        raise ValueError(f"a stage spec needs a `_target_`, this one has only {sorted(spec)}")
    cls = resolve(spec["_target_"], kind)
    arguments = {
        key: build(value, nn.Module)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in spec.items()
        if key != "_target_"
    }
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{spec['_target_']}: {error}") from error


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
