"""Refuses config keys that nothing reads, such as `optim.lr` beside `optim.optimizer.lr`.

Hydra accepts any key after a `+`, and any key in a recipe. A key counts as read if

- a program reads it (`_READ`),
- it belongs to an object with a `_target_`, which `check_values` checks against its signature, or
- an interpolation such as `${width}` or `${oc.select:width,4}` names it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.command.nearest import dotted, nearest
from experiments.run.files import FROZEN

#: Keys that programs read, by section; the section "" is the top level. An empty list of a section
#: stands for any keys.
_READ: dict[str, tuple[str, ...]] = {
    "": (
        *("name", "seed", "tags", "job_type", "run_name", "trial", "resume", "test", "blind"),
        *("print_config", "init", "init_allow", "expected", "expected_within", "prepare", "paths"),
        "data_samples",
        "every_device",
        *("data", "model", "module", "tuning", "optim", "scores", "trainer", "callbacks", "logger"),
        *("run", "trust", "output", "sizes", "device", "ranks", "mfu", "headroom", "samples"),
        *("advise", "frames", "videos", "images", "tokens", "labelled", "picture"),
    ),
    "expected": (),
    "init_allow": ("unused", "unfilled"),
    "model": ("encoder", "pooler", "positions", "rotary", "llm", "lora", "tiles"),
    "optim": ("optimizer", "scheduler"),
    "paths": ("data", "run", "runs", "shards"),
}

#: Sections of objects with names of the user's choice.
_OBJECTS = ("callbacks", "logger", "scores")

_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")
_KEY = re.compile(r"\.*[A-Za-z_][\w.\[\]]*")


def check_keys(config: DictConfig, typed: Sequence[str] | None = None) -> None:
    """Checks that something reads every key. The frozen config of a job has been checked before.

    Args:
        config: the composed config, with its interpolations.
        typed: if given, only keys that these words of the command line set are checked.

    Raises:
        ValueError: nothing reads a key. The message names the nearest one.
    """
    if HydraConfig.initialized() and HydraConfig.get().job.config_name == FROZEN:
        return
    plain: Any = OmegaConf.to_container(config, resolve=False)
    # `${optim}` passes a section on, but reads no particular key of it
    named = set(_named_in(plain)) - {*_READ, *_OBJECTS}
    unread = [key for key in _unread(plain) if not any(_within(key, name) for name in named)]
    if typed is not None:
        words = [word.lstrip("+").partition("=")[0] for word in typed]
        unread = [key for key in unread if any(_within(key, word) for word in words)]
    if unread:
        raise ValueError(describe_unread(unread[0], plain))


def describe_unread(key: str, config: dict[str, Any]) -> str:
    """Returns the message for a key that nothing reads."""
    section = key.rpartition(".")[0]
    known = [other for other in dotted(config) if not other.startswith(key)]
    if found := nearest(key, known):
        return f"{key}: nothing reads this key: did you mean {found}?"
    beside = [other for other in known if section and other.rpartition(".")[0] == section]
    kin = f" ({section} has {', '.join(beside)})" if beside else ""
    return f"{key}: nothing reads this key: leave it out{kin}"


def _unread(config: dict[str, Any]) -> Iterator[str]:
    """Yields keys that no program and no object reads."""
    for name, node in config.items():
        if name == "hydra":
            continue
        if name not in _READ[""]:
            yield from _leaves(node, name)
        elif name in _OBJECTS and isinstance(node, dict):
            for child, value in node.items():
                if value is not None and not _is_object(value):
                    yield from _leaves(value, f"{name}.{child}")
        elif _READ.get(name) and isinstance(node, dict):
            for child, value in node.items():
                if child not in _READ[name]:
                    yield from _leaves(value, f"{name}.{child}")


def _is_object(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "_target_" in value)


def _leaves(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, dict) and node and "_target_" not in node:
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}")
    else:
        yield key


def _within(key: str, other: str) -> bool:
    """Returns whether one of two keys is, or contains, the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _named_in(node: Any, key: str = "") -> Iterator[str]:
    """Yields the keys that interpolations name, relative ones as absolute keys."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _named_in(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for child in node:
            yield from _named_in(child, f"{key}.0")
    elif isinstance(node, str):
        while found := _INTERPOLATION.search(node):  # from the inside to the outside
            for word in re.split(r"[:,\s]", found[1]):
                if _KEY.fullmatch(word):
                    yield _absolute(word, key)
            node = node[: found.start()] + node[found.end() :]


def _absolute(word: str, key: str) -> str:
    """Returns the absolute key of `..width` in the value of `key`; one dot is its own section."""
    name = word.lstrip(".")
    name = name.replace("[", ".").replace("]", "")
    if up := len(word) - len(word.lstrip(".")):
        section = key.split(".")[:-up]
        return ".".join([*section, name])
    return name
