"""Says whether an object that a run directory names may be built.

A run directory is data, whoever made it. `_target_` in a config that was replayed from one may name
classes of this package and the short list below, and nothing else. Names are checked before
anything is imported.
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

#: Modules of other packages, and the kinds of classes in them that may be built.
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

#: Kinds of classes that write files, and join what they are told to the paths of these.
_WRITERS = (Callback, Logger, Precision, Profiler, Strategy, Trainer)

_TARGET = re.compile(r"\b_target_: *([\w.]+)")


def refusal(path: Any, trusted: Collection[str] = ()) -> str | None:
    """Returns why the object at the dotted `path` is not built, or None where it may be.

    Args:
        trusted: packages or modules of which everything that they define may be built, too.
    """
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        return "is no dotted name of a class"
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
    return "is no class of this package"


def _refusal_of_own(path: str) -> str | None:
    """A class that this package defines is built, and a function that its configs name.

    The way there leads through modules of the package alone: `datamodules.visuals.frames.os.system`
    names no such module.
    """
    module, _, name = path.rpartition(".")
    if not _is_own_module(module) or name.startswith("_"):
        return "is no class of this package"
    found = vars(import_module(module)).get(name)
    if isinstance(found, type) and found.__module__.partition(".")[0] in _OWN:
        return None
    return None if callable(found) and path in _configured() else "is no class of this package"


def _is_own_module(module: str) -> bool:
    """Whether there is such a file; looking for it imports nothing."""
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
    return f"is nothing that {package} defines"


@cache
def _configured() -> frozenset[str]:
    """Every `_target_` that the option files of this package name."""
    texts = (path.read_text() for path in CONFIG_DIR.rglob("*.yaml"))
    return frozenset(name for text in texts for name in _TARGET.findall(text))


def writes_files(path: str) -> bool:
    """Whether the class at the dotted `path`, which may be built, writes files where it is told."""
    found = get_object(path)
    return isinstance(found, type) and issubclass(found, _WRITERS)


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, `_target_`) of every node below a plain config that names one."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, child in node.items():
            yield from targets(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for number, child in enumerate(node):
            yield from targets(child, f"{key}.{number}")


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """The leaves of plain containers by dotted key; items of lists are numbered."""
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
