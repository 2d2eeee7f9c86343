"""Finds run directories, and tells in which settings their runs differ.

All programs that read several runs use this module, so that they agree on the factors of an
ablation. Reads only small files, and imports no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.command.old_words import NEW_KEYS
from experiments.command.overrides import DELETED, read_overrides, show_value
from experiments.run.files import FROZEN, inside, read_yaml

#: Files that mark a run directory: written by a launcher for a job, and by a job that has started.
FROZEN_FILE, CONFIG_FILE = f".hydra/{FROZEN}.yaml", "config.yaml"

#: Folders that hold no runs and may be very large.
_NOT_RUNS = {".hydra", "checkpoints", "slurm", "wandb"}

#: Sections that do not change what a run computes.
_NO_FACTORS = (
    *("hydra", "paths", "logger", "callbacks"),
    *("launcher", "print_config", "resume", "blind", "name", "run_name"),
    *("expected", "expected_within", "data_samples"),
)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. Files other than that of the overrides are read on first use.

    Attributes:
        overrides: values by key or group, from the command line.
        strict: whether a damaged file is an error; if not, it counts as empty.
    """

    folder: Path
    overrides: dict[str, Any]
    strict: bool = True

    @classmethod
    def read(cls, folder: Path, strict: bool = True) -> "Settings":
        """Reads the overrides.

        Raises:
            ValueError: their file is damaged, or a link out of the folder.
        """
        lines = read_yaml(inside(folder, ".hydra/overrides.yaml"))
        if lines is None:
            frozen = read_yaml(inside(folder, FROZEN_FILE)) or {}
            lines = frozen.get("hydra", {}).get("overrides", {}).get("task", [])
        return cls(folder, read_overrides(lines), strict)

    def value(self, key: str) -> str | None:
        """Returns a value as text, from the command line, the options or the config.

        It is None if the run has no such key.
        """
        if key in self.overrides:
            value = self.overrides[key]
            return None if value is DELETED else show_value(value)
        if key in self.choices:
            return self.choices[key]
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return None
            node = node[part]
        return show_value(node)

    @cached_property
    def choices(self) -> dict[str, str]:
        """The chosen option of every config group."""
        hydra = self._mapping(".hydra/hydra.yaml") or self._frozen
        choices = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
        return {group: show_value(v) for group, v in choices.items() if "hydra" not in group}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config; that of the launcher if the job has not started."""
        return self._mapping(CONFIG_FILE) or self._frozen

    @cached_property
    def _frozen(self) -> dict[str, Any]:
        return self._mapping(FROZEN_FILE)

    def _mapping(self, name: str) -> dict[str, Any]:
        try:
            found = read_yaml(inside(self.folder, name))
        except (OSError, ValueError):
            if self.strict:
                raise
            return {}
        return found if isinstance(found, dict) else {}


def find_runs(roots: Iterable[Path]) -> list[Path]:
    """Returns every run directory at or below `roots`; folders inside a run are not looked at.

    Numbers in names are sorted by value: job 10 of a multirun comes after job 9.

    Raises:
        ValueError: a root is missing or has no run.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"no folder {str(root)!r}; name one that holds run directories")
        found = dict.fromkeys(_find(root))
        if not found:
            raise ValueError(f"no run in {str(root)!r}: a run is a folder with a config.yaml")
        folders |= found
    return list(folders)


def _find(folder: Path) -> Iterator[Path]:
    if any((folder / mark).is_file() for mark in (FROZEN_FILE, CONFIG_FILE)):
        yield folder
        return
    for child in sorted(folder.iterdir(), key=_natural):
        if child.name not in _NOT_RUNS and child.is_dir() and not child.is_symlink():
            yield from _find(child)


def _natural(path: Path) -> tuple[bool, int, str]:
    name = path.name
    return (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)


def factors(runs: Sequence[Settings]) -> dict[str, list[str | None]]:
    """Returns what differs between runs, `seed` last: the value of each run by key.

    Typed keys come first. An option that nobody typed is a factor if the typed keys do not explain
    it: an edited default does count, and the options that two experiments choose do not. If nothing
    differs so far (another file was edited), the configs are compared key by key.
    """
    typed = dict.fromkeys(key for run in runs for key in run.overrides)
    found = _differing(runs, typed)
    settings = [values for key, values in found.items() if key != "seed"]
    levels = [tuple(values[n] for values in settings) for n in range(len(runs))]
    chosen = dict.fromkeys(key for run in runs for key in run.choices if key not in typed)
    for key, values in _differing(runs, chosen).items():
        if len(set(zip(levels, values, strict=True))) > len(set(levels)):
            found[key] = values
    if not found and len(runs) > 1:
        found = _differing(runs, dict.fromkeys(key for run in runs for key in _leaves(run.config)))
    return dict(sorted(found.items(), key=lambda item: item[0] == "seed"))


def _differing(runs: Sequence[Settings], keys: Iterable[str]) -> dict[str, list[str | None]]:
    values = {
        key: [run.value(key) for run in runs]
        for key in keys
        if key.partition(".")[0].partition("/")[0] not in _NO_FACTORS
    }
    return {key: seen for key, seen in values.items() if len(set(seen)) > 1}


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every leaf of a config, except values that equal a missing key."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif node is not None and not (prefix in NEW_KEYS and node == NEW_KEYS[prefix]):
        yield prefix
