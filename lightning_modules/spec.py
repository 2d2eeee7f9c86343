"""Builds a stage from its spec: a class path under `_target_` and the arguments beside it.

A spec is what a yaml of `configs/<stage>/` says and what a saved model's `config.json` holds, so
opening somebody's checkpoint must not run somebody's code: only classes that this package itself
defines are built, and anything else is refused before it is imported.
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
        kind: base class that it must have.

    Raises:
        ValueError: the path leads elsewhere, or to something that is not such a class of this
            package.
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
    """Calls the class under `_target_` with the other keys, nested specs built first.

    Args:
        kind: base class that the class must have; nested specs build modules.

    Raises:
        ValueError: no `_target_`, a class that is refused, or arguments it does not take.
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
    """Has `model` use one of transformers' implementations: sdpa, eager, flash_attention_2, …

    Raises:
        ValueError: the word, the package that is missing, or what the model does not support.
    """
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix("Specified ")
        raise ValueError(f"model.{stage}.attention={attention} cannot be used: {reason}") from None
