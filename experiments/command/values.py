"""Checks config values against the type annotations of their targets, before anything is built.

optim.optimizer: {_target_: torch.optim.AdamW, lr: abc}
                            |                   |
                lr: float | Tensor   <----------+   "optim.optimizer.lr=abc must be a number"
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.command.nearest import dotted, nearest

#: Packages of targets whose annotations are read. No other target is imported here.
_READ = ("datamodules.", "lightning.", "lightning_modules.", "torch.optim.")

#: Types of keys that no annotated argument receives.
_TOP: dict[str, Any] = {
    "init": str | None,
    "job_type": str,
    "name": str,
    "print_config": bool,
    "resume": bool,
    "run_name": str,
    "seed": int,
    "tags": list[str],
    "test": bool,
    "blind": bool,
    "trial": bool,
}

#: Most arguments of a target that a message lists.
_FEW = 12

#: Keys of a node that Hydra reads itself.
_OF_HYDRA = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")

#: Sections that others interpolate. They are checked first, so that errors name the user's key.
_FIRST = ("optim", "tuning", "model")

#: Least values of options that Lightning and PyTorch accept unchecked and fail with later.
_LEAST = {
    "data.stream.num_workers": 0,
    "data.stream.timeout_s": 0.001,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": 1e-9,
}

#: Options for which 0 would train nothing. -1 means no limit.
_NOT_ZERO = ("trainer.max_epochs", "trainer.max_steps")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}

_MOST_SEED = 2**32 - 1  # limit of NumPy's generators


def check_values(config: DictConfig) -> None:
    """Checks every value against the annotation of the argument that receives it.

    Raises:
        ValueError: a value has the wrong type or is out of range, or no argument receives it. The
            message names its key.
    """
    for key, hint in _TOP.items():
        if key in config:
            value = config[key]
            _check(
                OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, hint, key
            )
    if not 0 <= config.seed <= _MOST_SEED:
        raise ValueError(f"seed={config.seed} must be from 0 to {_MOST_SEED}")
    for section in sorted(map(str, config), key=lambda name: name not in _FIRST):
        if OmegaConf.is_config(config[section]):
            _check_node(OmegaConf.to_container(config[section], resolve=True), section, config)
    for key, least in _LEAST.items():
        value = OmegaConf.select(config, key)
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f"{key}={value} must be {_or_more(least)}")
    for key in _NOT_ZERO:
        if OmegaConf.select(config, key) == 0:
            raise ValueError(f"{key}=0 would train nothing: set 1 or more, or -1 for no end")
    _check_frames(config)


def _check_frames(config: DictConfig) -> None:
    """Refuses frames that decide their own size, if the encoder reads squares of one size."""
    side = OmegaConf.select(config, "model.encoder.image_size")
    policy = OmegaConf.select(config, "data.frames.policy")
    if side is None or policy is None or OmegaConf.select(config, "data.frames.image_size"):
        return
    if not policy.get("height") == policy.get("width") == side:
        raise ValueError(
            f"the encoder reads squares of {side} x {side} pixels: choose data/frames=square, pad "
            "or crop, or an encoder of native sizes such as encoder=qwen2_vl"
        )


def _or_more(least: float) -> str:
    return f"{least} or more" if least in (0, 1) else "more than 0"


def _check_node(node: Any, key: str, config: DictConfig) -> None:
    if isinstance(node, dict):
        target: Any = node.get("_target_")
        hints, taken = _hints(target), _arguments(target)
        for name, value in node.items():
            if taken is not None and name not in taken and name not in _OF_HYDRA:
                raise ValueError(_describe_unknown(f"{key}.{name}", target, taken, config))
            if name in hints:
                _check(value, hints[name], f"{key}.{name}")
            _check_node(value, f"{key}.{name}", config)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            _check_node(child, f"{key}.{number}", config)


def _check(value: Any, hint: Any, key: str) -> None:
    if value != "???" and not fits(value, hint):  # a missing value is reported where it is read
        shown = "null" if value is None else value
        raise ValueError(f"{key}={shown} must be {describe(hint)}")


def _describe_unknown(key: str, target: str, taken: Collection[str], config: DictConfig) -> str:
    """Returns the message for an argument that a target does not take, with the nearest key."""
    section, _, name = key.rpartition(".")
    told = f"{key}: {target.rpartition('.')[2]} has no argument {name}"
    known = [f"{section}.{other}" for other in sorted(taken)]
    everywhere = dotted(OmegaConf.to_container(config, resolve=False))
    real = [other for other in everywhere if not other.startswith(f"{section}.")]
    if found := nearest(key, known) or nearest(key, real):
        return f"{told}: did you mean {found}?"
    few = f" ({section} takes {', '.join(sorted(taken))})" if len(taken) <= _FEW else ""
    return f"{told}: leave it out{few}"


def _arguments(target: Any) -> set[str] | None:
    """Returns the names of the arguments that a target takes, or None if it takes any, or unread.

    A class that passes `**options` on takes those of its base classes, too.
    """
    found = _read(target)
    if found is None:
        return None
    names: set[str] = set()
    for owner in found.__mro__ if inspect.isclass(found) else [found]:
        if owner is object:
            return None
        if inspect.isclass(owner) and "__init__" not in vars(owner):
            continue
        try:
            call = inspect.signature(owner.__init__ if inspect.isclass(owner) else owner)
        except (TypeError, ValueError):
            return None
        names |= set(call.parameters)
        if not any(p.kind is p.VAR_KEYWORD for p in call.parameters.values()):
            return names - {"self"}
    return None


def _read(target: Any) -> Any:
    """Returns the class or function of a target, or None if it is not read here."""
    if not isinstance(target, str) or not target.startswith(_READ):
        return None
    try:
        return get_object(target)
    except Exception:
        return None  # no such target: `instantiate` reports that better


def _hints(target: Any) -> dict[str, Any]:
    """Returns annotations of a target's arguments, also of those that its base classes take."""
    found = _read(target)
    if found is None:
        return {}
    hints: dict[str, Any] = {}
    for owner in reversed(found.__mro__) if inspect.isclass(found) else [found]:
        try:
            hints |= get_type_hints(owner.__init__ if inspect.isclass(owner) else owner)
        except (AttributeError, NameError, TypeError):
            continue  # annotations with names that only type checkers import
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a config value fits the annotation `hint`.

    A value that cannot be judged before objects are built counts as fitting.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(value, dict) and "_target_" in value:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (list, Sequence, Iterable, Collection):
        items = arguments[0] if arguments else Any
        return isinstance(value, list) and all(fits(item, items) for item in value)
    if origin is tuple:
        same = Ellipsis in arguments or (isinstance(value, list) and len(value) == len(arguments))
        return isinstance(value, list) and same
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if origin is Callable or hint is Callable:
        return isinstance(value, dict)
    return _fits_class(value, hint)


def _fits_class(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    if inspect.isclass(hint) and (value is None or isinstance(value, (bool, int, float, str))):
        try:
            return isinstance(value, hint)
        except TypeError:  # a protocol, which isinstance cannot check
            return True
    return True


def describe(hint: Any) -> str:
    """Returns a description of an annotation, such as `a number or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = dict.fromkeys(describe(part) for part in arguments)
        if "a number" in words:
            words.pop("a whole number", None)
        return " or ".join(word for word in words if word)
    if origin is Literal:
        return ", ".join(str(word) for word in arguments)
    if origin in (list, Sequence, Iterable, Collection):
        return "a list"
    if origin is tuple:
        return f"a list of {len(arguments)}" if Ellipsis not in arguments else "a list"
    if origin in (dict, Mapping):
        return "a mapping"
    return _WORDS.get(hint, "")  # empty for an object that no word can give
