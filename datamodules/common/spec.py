"""Builds an object from its spec: a class path under `_target_`, and the arguments beside it.

A spec comes from a YAML file of `configs/`, or from a file of a saved model. Opening a stranger's
files must not run the stranger's code. Therefore only classes that one named package of ours
defines are built. All others are refused before they are imported.
"""

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(path: Any, package: str, kind: type = object) -> type:
    """Returns the class at a dotted path under `package`.

    Args:
        kind: required base class.

    Raises:
        ValueError: the path is outside the package, or does not name a subclass of `kind` that the
            package defines.
    """
    module_path, _, name = str(path).rpartition(".")
    if not module_path.startswith(f"{package}."):
        raise ValueError(f"class {path!r} refused: only classes under {package} are built")
    try:
        found = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {path!r}") from error
    if not isinstance(found, type) or not found.__module__.startswith(f"{package}."):
        raise ValueError(f"class {path!r} refused: not a class defined under {package}")
    if not issubclass(found, kind):
        raise ValueError(f"class {path!r} refused: it is not a subclass of {kind.__name__}")
    return found


def build(spec: Mapping[str, Any], package: str, kind: type = object, nested: type = object) -> Any:
    """Calls the class under `_target_` with the other keys as arguments; builds nested specs first.

    Hydra's key `_partial_` is left out: it says when a program builds the object.

    Args:
        kind: required base class.
        nested: the same for nested specs.

    Raises:
        ValueError: `_target_` is missing, a class is refused, or it does not take the arguments.
    """
    if "_target_" not in spec:
        raise ValueError(f"a spec needs a `_target_`, this one has only {sorted(spec)}")
    cls = resolve(spec["_target_"], package, kind)
    arguments = {
        key: build(value, package, nested, nested)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in spec.items()
        if key not in ("_target_", "_partial_")
    }
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{spec['_target_']}: {error}") from error


def class_name(spec: Mapping[str, Any]) -> str:
    """Returns the name of the class of a spec, without its module."""
    return str(spec["_target_"]).rpartition(".")[2]
