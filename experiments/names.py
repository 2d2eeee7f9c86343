"""Run directories are named by what was overridden."""

import hashlib
import re

from omegaconf import OmegaConf

_LONGEST_NAME = 150  # file systems end at 255 bytes, and W&B adds its own


def name_run(rotary: str, seed: int, overrides: str) -> str:
    """`videorope-seed0` and whatever else was overridden, as a folder that Hydra can be told."""
    name = "-".join(part for part in (rotary, f"seed{seed}", overrides) if part)
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("run_name", name_run, replace=True)
