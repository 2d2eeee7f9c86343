"""Decides whether an object that a run directory names may be built.

A run directory is untrusted data. A `_target_` in a replayed config may name only classes of this
package and of the short list below. Names are checked before anything is imported.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from experiments import CONFIG_DIR

_OWN = ("lightning_modules", "datamodules")

#: Modules of other packages, and base classes of the classes in them that may be built.
_OTHERS: Mapping[str, tuple[type, ...]] = {
    "torch.optim": (Optimizer,),
    "torch.optim.lr_scheduler": (LRScheduler,),
    "lightning": (Trainer,),
    "lightning.pytorch": (Trainer,),
    "lightning.pytorch.callbacks": (Callback,),
    "lightning.pytorch.loggers": (CSVLogger, TensorBoardLogger, WandbLogger),
    "lightning.pytorch.plugins": (Precision,),
    "lightning.pytorch.profilers": (Profiler,),
    "lightning.pytorch.strategies": (Strategy,),
}

#: Base classes of classes that write files, and may join their options to file paths.
_WRITERS = (Callback, Logger, Precision, Profiler, Strategy, Trainer)

_TARGET = re.compile(r"\b_target_: *([\w.]+)")


def refusal(path: Any, trusted: Collection[str] = ()) -> str | None:
    """Returns why the object at the dotted `path` must not be built, or None if it may be.

    Args:
        path: dotted name of the object.
        trusted: packages or modules whose own definitions may all be built, too.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        return "is not a dotted name of a class"
    module, _, name = path.rpartition(".")
    if path.partition(".")[0] in _OWN:
        return _refusal_of_own(path)
    if module in _OTHERS:
        found = getattr(import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, _OTHERS[module]):
            return None
    for package in trusted:
        if path.startswith(f"{package}."):
            return _refusal_of_trusted(path, package)
    return "is not a class of this package"


def _refusal_of_own(path: str) -> str | None:
    """Returns why a name in this package must not be built, or None if it may be.

    Allowed are classes that this package defines, and functions that its configs name. All parts
    before the name must be modules of the package: `datamodules.visuals.frames.os.system` is
    refused.
    """
    module, _, name = path.rpartition(".")
    if not _is_own_module(module) or name.startswith("_"):
        return "is not a class of this package"
    found = vars(import_module(module)).get(name)
    if isinstance(found, type) and found.__module__.partition(".")[0] in _OWN:
        return None
    return None if callable(found) and path in _configured() else "is not a class of this package"


def _is_own_module(module: str) -> bool:
    """Returns whether the module has a file in this package. Does not import the module."""
    package, *parts = module.split(".")
    if package not in _OWN:
        return False
    place = Path(import_module(package).__path__[0], *parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def _refusal_of_trusted(path: str, package: str) -> str | None:
    found = get_object(path)
    home = str(getattr(found, "__module__", ""))
    if callable(found) and f"{home}.".startswith(f"{package}."):
        return None
    return f"is not defined in {package}"


@cache
def _configured() -> frozenset[str]:
    """Returns every `_target_` in the config files of this package."""
    texts = (path.read_text() for path in CONFIG_DIR.rglob("*.yaml"))
    return frozenset(name for text in texts for name in _TARGET.findall(text))


def writes_files(path: str) -> bool:
    """Returns whether the class at the allowed dotted `path` writes files to configured paths."""
    found = get_object(path)
    return isinstance(found, type) and issubclass(found, _WRITERS)


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, `_target_`) of every node of a plain config that has a `_target_`."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, child in node.items():
            yield from targets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for number, child in enumerate(node):
            yield from targets(child, f"{key}.{number}")


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Returns the leaves of plain containers by dotted key. List items have their number as key."""
    pairs: Any = ()
    if isinstance(node, Mapping):
        pairs = node.items()
    elif isinstance(node, list | tuple):
        pairs = enumerate(node)
    elif key:
        return {key: node}
    leaves: dict[str, Any] = {}
    for name, child in pairs:
        leaves |= flat(child, f"{key}.{name}" if key else str(name))
    return leaves
