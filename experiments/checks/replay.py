"""Replays the command line of a training for ropelab-evaluate, and restricts what it may do.

A run directory is untrusted data. Its words may choose among this package's classes, options and
sizes. They must not run a program, read an environment variable, read an option from another
folder, or choose where files are written. `trust=[…]` allows one such thing by name. The words that
the user types are not restricted.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from datamodules.stream.reading.source import REPLAYED
from experiments.checks.trust import flat, refusal, targets, writes_files
from experiments.command.old_words import without_plus
from experiments.run.compose import plain
from experiments.run.files import inside, printable, read_yaml

#: Keys that belong only to the training, or only to the evaluating user, with all keys below them.
_NOT_REPLAYED = ("hydra", "launcher", "debug", "resume", "test", "init", "init_allow")
_NOT_THEIRS = ("run", "trust", "paths.run", "paths.runs")

#: Resolvers `${name:…}` that reveal nothing about this machine.
_RESOLVERS = ("hydra", "now", "oc.select", "run_name")

#: Keys whose values are folders to write to.
_WRITTEN = (
    "default_root_dir",
    "dir",
    "dirpath",
    "folder",
    "index_cache",
    "log_dir",
    "root_dir",
    "save_dir",
)


@dataclass(frozen=True)
class Replay:
    """Words of a training that are put before the typed words.

    Args:
        run: the run directory, if the user named one.
        typed: words of the command line.
        words: words of the training.
        trust: what `trust=` allows: packages, and resolver names or `pipe` with a colon at the end.
    """

    run: Path | None
    typed: Sequence[str]
    words: Sequence[str] = ()
    trust: Sequence[str] = field(default=())

    def check(self, config: DictConfig) -> None:
        """Checks that the composed config asks for nothing that a run directory may not.

        Raises:
            ValueError: the run directory asks for a class that is not allowed, a shell command, or
                a folder to write to. The message says how to allow it.
        """
        if not self.words:
            return
        nodes = {key: node for key, node in plain(config).items() if key != "prepare"}
        leaves = flat(nodes)
        writers: list[str] = []
        for key, target in targets(nodes):
            reason = refusal(target, self.trust)
            if reason and _below(leaves, key) != _below(self._typed_alone, key):
                package = str(target).partition(".")[0]
                self._refuse(f"{key}._target_={target}", f"which {reason}", package)
            if not reason and writes_files(target):
                writers.append(key)
        for key, value in leaves.items():
            if not isinstance(value, str):
                continue
            command = value.lstrip().startswith("pipe:") and "pipe:" not in self.trust
            joined = any(key.startswith(f"{writer}.") for writer in writers)
            outside = _leads_out(key, value, joined, config.paths.run)
            if not (command or outside) or self._typed_alone.get(key) == value:
                continue
            if command:
                self._refuse(f"{key}={value}", "a shell command", "pipe:")
            raise ValueError(
                f"{self.run} sets {printable(f'{key}={value}')}, a folder to write to outside of "
                f"{config.paths.run}: set {key} yourself"
            )

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Makes this process and its children refuse URLs that run a program, inside the block."""
        if not self.words:
            yield
            return
        before = os.environ.get(REPLAYED)
        strings = [text for word in self.typed for text in _strings(_value(word))]
        allowed = [text for text in strings if text.startswith("pipe:") or "://" in text]
        os.environ[REPLAYED] = json.dumps([*allowed, *self.trust])
        try:
            yield
        finally:
            del os.environ[REPLAYED]
            if before is not None:
                os.environ[REPLAYED] = before

    @cached_property
    def _typed_alone(self) -> dict[str, Any]:
        """Leaves of the config that the typed words give without the words of the training."""
        words = [word for word in self.typed if not word.startswith("-")]
        leaves: dict[str, Any] = {}
        composed: Sequence[str] = ()
        # Words such as data.grid.frames=[9] may not compose without the options of the training.
        for chosen in (words, [word for word in words if "." not in word.partition("=")[0]]):
            try:
                leaves = flat(plain(hydra.compose("evaluate", chosen)))
                composed = chosen  # these have their interpolations resolved
                break
            except (HydraException, OmegaConfBaseException):
                continue
        for word in (word for word in words if word not in composed):
            leaves |= flat(_value(word), _parse(word).key_or_group)
        return leaves

    def _refuse(self, what: str, why: str, word: str) -> None:
        raise ValueError(
            f"{self.run} asks for {printable(what)}, {why}: add 'trust=[{printable(word)}]' if you "
            "know who made it"
        )


def read_replay(typed: Sequence[str]) -> Replay:
    """Reads the words to replay from the run directory that `run=` names in `typed`.

    Adds absolute paths, so that the training's data is found from any working directory.

    Raises:
        ValueError: several runs, damaged files, or words that a run directory may not contain.
    """
    typed = without_plus(typed)
    if any(word in ("-m", "--multirun") for word in typed):
        raise ValueError("one run at a time; call ropelab-evaluate once for each run=")
    folders = [word.partition("=")[2].strip("'\"") for word in typed if word.startswith("run=")]
    run = Path(folders[-1]) if folders else None
    if run is not None and not any(word.startswith("hydra.run.dir=") for word in typed):
        inside(run, "evaluate")  # where results go
    if run is None or not (run / ".hydra" / "overrides.yaml").is_file():
        return Replay(run, typed)
    words, cwd, data = _read(run)
    trust = _trusted(typed)
    left_out = _NOT_REPLAYED
    if any(word.startswith("data=") and word not in words for word in typed):
        left_out += ("data",)  # they belong to another datamodule
    kept = [word for word in words if not _is_left_out(word, left_out, run)]
    for word in kept:
        _check_word(word, trust, run)
    found = [f"paths.data={_quoted(Path(cwd) / data, run)}"]
    made = run.resolve() / "shards"
    if made.is_dir():
        found.append(f"paths.shards={_quoted(made, run)}")
    replayed = [*kept, *found]
    if list(typed[: len(replayed)]) == replayed:  # Lightning starts its ranks with them already
        typed = typed[len(replayed) :]
    return Replay(run, typed, replayed, trust)


def _read(run: Path) -> tuple[list[str], str, str]:
    """Returns (overrides, working directory of the training, paths.data)."""
    damaged = f"the files that describe {run} are damaged"
    try:
        words = read_yaml(inside(run, ".hydra/overrides.yaml"))
        cwd = read_yaml(inside(run, ".hydra/hydra.yaml"))["hydra"]["runtime"]["cwd"]
        data = read_yaml(inside(run, "config.yaml"))["paths"]["data"]
        if not isinstance(words, list) or not all(isinstance(t, str) for t in (*words, cwd, data)):
            raise TypeError
    except (OSError, TypeError, KeyError) as error:
        raise ValueError(f"{damaged} ({type(error).__name__})") from None
    except ValueError as error:
        raise ValueError(f"{damaged}: {printable(str(error))}") from None
    return without_plus(words), cwd, data


def _is_left_out(word: str, left_out: Sequence[str], run: Path) -> bool:
    if word.startswith("-"):
        raise ValueError(f"{run} was not trained with {word!r}: an override never starts with -")
    override = _parse(word)
    key = override.key_or_group
    if str(override.package or "").startswith("hydra"):
        raise ValueError(f"{run} must not set {word!r}: Hydra's own settings are not replayed")
    dotted = key.replace("/", ".")
    return any(
        dotted == other or dotted.startswith(f"{other}.") for other in (*left_out, *_NOT_THEIRS)
    )


def _check_word(word: str, trust: Sequence[str], run: Path) -> None:
    override = _parse(word)
    key, value = override.key_or_group, override.value()
    if override.is_sweep_override():
        raise ValueError(f"{run} was not trained with {word!r}: a run has a single value")
    if isinstance(value, Mapping) and any(name.startswith(f"{key}.") for name in _NOT_THEIRS):
        raise ValueError(f"{run} must not set {word!r}: set {key} yourself")
    for text in _strings(value):
        for name in _resolvers(text):
            if name not in _RESOLVERS and f"{name}:" not in trust:
                raise ValueError(
                    f"{run} must not set {word!r}, which reads ${{{name}:…}}: add "
                    f"'trust=[{name}:]' if you know who made it"
                )
        if "." not in key and (text.startswith("/") or ".." in Path(text).parts):
            raise ValueError(f"{run} must not set {word!r}: the option lies outside of configs")


def _resolvers(text: str) -> Iterator[str]:
    """Yields the resolver names of `${name:…}`. A composed name is given as it is written."""
    for name, colon in re.findall(r"\$\{([^:}]*)(:?)", text):
        if colon or "$" in name:
            yield name.strip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.items():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value


def _trusted(typed: Sequence[str]) -> list[str]:
    """Returns what the typed `trust=` words allow."""
    overrides = [_parse(word) for word in typed if word.startswith("trust=")]
    return [text for override in overrides for text in _strings(override.value())]


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        raise ValueError(f"cannot read {word!r}: {str(error).splitlines()[0]}") from None


def _value(word: str) -> Any:
    """Returns the value of an override; None for an option, and for its value (`--cfg job`)."""
    return _parse(word).value() if "=" in word and not word.startswith("-") else None


def _quoted(path: Path, run: Path) -> str:
    """Quotes a path as a value for Hydra's command line, and escapes `'` and `\\` in it.

    Raises:
        ValueError: the path holds an interpolation, which works even in quotes.
    """
    if "${" in str(path):
        raise ValueError(f"{run} must not set the folder of its data to {str(path)!r}")
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", str(path))
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _below(leaves: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in leaves.items() if name.startswith(f"{key}.")}


def _leads_out(key: str, value: str, joined: bool, folder: str) -> bool:
    """Returns whether an option of a config makes a class write outside of `folder`.

    Args:
        joined: whether the option belongs to a class that writes files. Such a class may join any
            named option to a path, as loggers do with `name` and `version`. It may use a positional
            option as a path by itself.
    """
    inside_it = Path(value).resolve().is_relative_to(Path(folder).resolve())
    if key.rpartition(".")[2] in _WRITTEN or (joined and "_args_" in key.split(".")):
        return not inside_it
    return joined and (".." in Path(value).parts or (Path(value).is_absolute() and not inside_it))
