"""What the programs share: a composed config in, its objects and its run directory out."""

import hashlib
import logging
import re
import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import rich
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.syntax import Syntax

from datamodules.batch import BadSampleError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 150  # file systems end at 255 bytes, and W&B adds its own


def name_run(rotary: str, seed: int, overrides: str) -> str:
    """`videorope-seed0` and whatever else was overridden, as a folder that Hydra can be told."""
    name = "-".join(part for part in (rotary, f"seed{seed}", overrides) if part)
    name = re.sub(r"[^\w.+-]+", "_", name).strip("_")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def plain(node: Any) -> Any:
    """A config node as plain containers, every interpolation resolved."""
    return OmegaConf.to_container(node, resolve=True)


def build(node: Any, what: str, **arguments: Any) -> Any:
    """Hydra's instantiate, its errors in one line that names `what`.

    Raises:
        ValueError: whatever went wrong.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise ValueError(f"{what}: {str(reason).splitlines()[0]}") from error


def build_all(group: Any, what: str) -> list[Any]:
    """The objects of a group such as `callbacks`; a node set to null is left out."""
    return [build(node, f"{what}.{name}") for name, node in (group or {}).items() if node]


def open_run_directory(config: DictConfig) -> Path:
    """Makes the run directory and writes down what runs in it: config and command."""
    folder = Path(config.paths.run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    program = Path(sys.argv[0]).name
    (folder / "command.txt").write_text(shlex.join([program, *sys.argv[1:]]) + "\n")
    if config.print_config:
        rich.print(
            Syntax(OmegaConf.to_yaml(config, resolve=True), "yaml", background_color="default")
        )
    return folder


def user_errors_in_one_line(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Ends the program with a line and no traceback where the user can put it right."""

    @wraps(main)
    def guarded(config: DictConfig) -> Any:
        try:
            return main(config)
        except (ValueError, OSError, BadSampleError) as error:
            logger.debug("where it came from", exc_info=True)
            sys.exit(f"error: {error}")

    return guarded
