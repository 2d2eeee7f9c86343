"""Finds the directory of a run: `${run_folder:...}/${run_name:}` in the configs.

runs/NAME/videorope-seed0-pooler_average                          a single run: all that was typed
runs/NAME/with-trainer.max_steps_40/videorope-seed0-pooler_average
          constants of its sweep    what the sweep varies

Both paths are exact: they tell every setting, so two settings never share a directory. One setting
has several paths, depending on what was swept with it. If a run is at one of them, it is used
there, so a sweep and a single run find each other's runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import CONFIG_DIR
from experiments.command.names import name_constants, name_run
from experiments.command.overrides import read_overrides
from experiments.run.files import FROZEN, read_yaml

#: Files that show that a run, or a job that waits, is in a folder.
_MARKS = ("config.yaml", f".hydra/{FROZEN}.yaml")

#: Keys that the jobs of a sweep share, while one of them is composed. None: no job is composed.
_shared: ContextVar[frozenset[str] | None] = ContextVar("shared", default=None)
_naming: ContextVar[bool] = ContextVar("naming", default=False)


def constants(typed: Sequence[str]) -> frozenset[str]:
    """Returns the keys that the typed words of a sweep set to one value for all of its jobs.

    Without a swept word it is empty: all words name the run.
    """
    overrides = OverridesParser.create().parse_overrides(list(typed))
    swept = [str(o.input_line) for o in overrides if o.is_sweep_override()]
    if not swept:
        return frozenset()
    fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
    return frozenset(read_overrides(fixed)) - frozenset(read_overrides(swept))


def shared_by_jobs(sweep: DictConfig) -> frozenset[str]:
    """Returns the keys that the folder of a sweep shows, so that the names of its runs need not.

    Args:
        sweep: the config of the sweep, with the node `hydra`. Its own `hydra.sweep.dir` shows none.
    """
    raw: Any = OmegaConf.to_container(sweep.hydra.sweep)
    if "${run_folder:" not in str(raw["dir"]):
        return frozenset()
    return constants(OmegaConf.to_container(sweep.hydra.overrides.task))  # pyright: ignore[reportArgumentType]


@contextmanager
def sharing(keys: frozenset[str]) -> Iterator[None]:
    """Inside the context, runs are named as jobs of a sweep that share the values of `keys`."""
    token = _shared.set(keys)
    try:
        yield
    finally:
        _shared.reset(token)


def _run_folder(parent: str, *, _root_: DictConfig) -> str:
    """Returns the folder of the run directory; before the jobs of a sweep are composed, of all."""
    settings, groups = _settings(_root_)
    if "run_name" in settings:  # the user names the runs
        return parent
    typed: Any = OmegaConf.to_container(_hydra(_root_).overrides.task)
    if _shared.get() is None and (keys := constants(typed)):
        return str(_with(Path(parent), settings, keys, groups))
    return str(_locate(Path(parent), _begin(_root_), settings, groups).parent)


def _run_name(*, _root_: DictConfig) -> str:
    """Returns the name of the run that Hydra is composing or running."""
    settings, groups = _settings(_root_)
    if _naming.get():  # a setting interpolates this name
        return name_run(*_begin(_root_), settings, groups)
    parent = Path(str(OmegaConf.select(_root_, "paths.runs")), str(_root_.get("name")))
    return _locate(parent, _begin(_root_), settings, groups).name


def _locate(
    parent: Path,
    begin: tuple[str | None, int],
    settings: Mapping[str, Any],
    groups: frozenset[str],
) -> Path:
    """Returns the directory of a run: where it is, otherwise where it will be."""

    def path(shared: frozenset[str]) -> Path:
        own = {key: value for key, value in settings.items() if key not in shared}
        return _with(parent, settings, shared, groups) / name_run(*begin, own, groups)

    first = path(_shared.get() or frozenset())
    if _is_run(first):
        return first
    elsewhere = [path(frozenset())]
    for folder in parent.glob("with-*"):
        keys = _keys(folder / "multirun.yaml")
        if _with(parent, settings, keys, groups) == folder:
            elsewhere.append(path(keys))
    return next(filter(_is_run, elsewhere), first)


def _with(
    parent: Path, settings: Mapping[str, Any], keys: frozenset[str], groups: frozenset[str]
) -> Path:
    """Returns the folder of the runs that share the values of `keys`."""
    shared = {key: value for key, value in settings.items() if key in keys}
    return parent / name_constants(shared, groups) if shared else parent


def _is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _keys(multirun: Path) -> frozenset[str]:
    """Returns the keys that the sweep of a `multirun.yaml` did not vary."""
    try:
        return _read_keys(multirun, multirun.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


@cache
def _read_keys(multirun: Path, changed: int) -> frozenset[str]:
    return constants(read_yaml(multirun)["hydra"]["overrides"]["task"])


def _hydra(root: DictConfig) -> Any:
    """Returns Hydra's config: a part of `root` while Hydra composes it, beside it in a program."""
    return root.hydra if "hydra" in root else HydraConfig.get()


def _begin(root: DictConfig) -> tuple[str | None, int]:
    """Returns the rotary scheme and the seed, with which every name begins."""
    return _hydra(root).runtime.choices.get("rotary"), root.seed


def _settings(root: DictConfig) -> tuple[dict[str, Any], frozenset[str]]:
    """Returns the values that name the run by key, and all config groups."""
    hydra = _hydra(root)
    unnamed = hydra.job.config.override_dirname.exclude_keys
    typed: Any = OmegaConf.to_container(hydra.overrides.task)  # interpolations stay as typed
    settings = {
        key: _resolved(key, value, root)
        for key, value in read_overrides(typed).items()
        if key not in unnamed
    }
    return settings, _find_groups() | set(hydra.runtime.choices)


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


@cache
def _find_groups() -> frozenset[str]:
    """Returns the config groups of this package. Some are missing in some compositions."""
    folders = (path for path in CONFIG_DIR.rglob("*") if path.is_dir())
    return frozenset(str(folder.relative_to(CONFIG_DIR)) for folder in folders)


OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
