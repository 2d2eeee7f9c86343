"""Reads run directories: everything that a report needs from disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command.overrides import DELETED, read_overrides, show_value
from experiments.run.files import inside, read_curves, read_yaml
from lightning_modules.metrics.bootstrap import MeanInterval

#: Stands for a value that a run does not have.
ABSENT = "-"

#: Folders inside a run that may hold another `config.yaml`. They do not count as runs, nor does a
#: later evaluation of the run's model.
NOT_RUNS = {".hydra", "wandb", "checkpoints", "evaluate"}


class Cell(NamedTuple):
    """One square of a needle test: a question about one needle at one depth of one haystack."""

    frames: int
    depth: float
    needle: int
    correct: bool


@dataclass(frozen=True)
class Needle:
    """The result of the needle test of one run."""

    rotary: str
    seed: int
    step: int
    train_frames: tuple[int, int]  # fewest and most frames of a training sample
    cells: dict[str, list[Cell]]  # by condition: plain, periodic, single
    blind: MeanInterval
    ceiling: MeanInterval
    majority: float  # score of always giving the most common answer
    logit_change: float
    changed_at: tuple[int, float]  # frames and depth of the frame that was changed
    computed: int  # tokens run through the LLM, with the haystack's prefix shared
    recomputed: int  # tokens if every cell had been run by itself


@dataclass(frozen=True)
class Run:
    folder: Path
    # Values are texts in these three.
    overrides: dict[str, str]  # overrides of the command line
    choices: dict[str, str]  # the chosen option of every config group
    config: dict[str, str]  # leaves of the resolved config, by dotted key
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    needle: Needle | None = None
    generations: list[dict[str, str]] = field(default_factory=list)

    def value(self, key: str) -> str:
        for known in (self.overrides, self.choices, self.config):
            if key in known:
                return known[key]
        return ABSENT

    @property
    def last_step(self) -> int:
        return max((points[-1][0] for points in self.curves.values()), default=0)

    @property
    def status(self) -> str:
        if self.needle:
            return "tested"
        if self.curves:
            return (
                f"no needle.json: not tested yet, or stopped (last step logged: {self.last_step})"
            )
        return "no metrics.csv and no needle.json: not started, or stopped before its first step"


def load_runs(roots: list[Path]) -> list[Run]:
    """Returns every run at or below `roots`, in the order of the paths.

    Raises:
        ValueError: a root is missing or holds no run, or a file of a run cannot be read.
    """
    folders: dict[Path, None] = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"no such folder: {root}")
        found = sorted(_run_folders(root), key=lambda folder: _natural(folder.parts))
        if not found:
            raise ValueError(f"no run below {root}: a run is a folder with a config.yaml")
        folders.update(dict.fromkeys(found))
    return [load_run(folder) for folder in folders]


def load_run(folder: Path) -> Run:
    file = partial(inside, folder)
    config = read_yaml(file("config.yaml")) or read_yaml(file(".hydra/config.yaml")) or {}
    hydra = read_yaml(file(".hydra/hydra.yaml")) or {}
    choices = hydra.get("hydra", {}).get("runtime", {}).get("choices", {})
    lines = read_yaml(file(".hydra/overrides.yaml")) or []
    overrides = read_overrides(lines)
    command = file("command.txt")
    needle = read_needle(file("needle.json"))
    measured = {"rotary": needle.rotary, "seed": str(needle.seed)} if needle else {}
    return Run(
        folder=folder,
        overrides={k: ABSENT if v is DELETED else show_value(v) for k, v in overrides.items()},
        choices=measured
        | {k: show_value(v) for k, v in choices.items() if not k.startswith("hydra")},
        config={key: show_value(value) for key, value in _leaf_values(config)},
        command=command.read_text().strip() if command.is_file() else "",
        versions=_versions(file("versions.json")),
        curves=read_curves(file("metrics.csv")),
        needle=needle,
        generations=_generations(file("generations.jsonl")),
    )


def _run_folders(root: Path) -> Iterator[Path]:
    for pattern, up in (("config.yaml", 0), (".hydra/config.yaml", 1)):
        for path in root.rglob(pattern):
            folder = path.parents[up]
            if not NOT_RUNS.intersection(folder.relative_to(root).parts):
                yield folder


def _natural(parts: tuple[str, ...]) -> list[tuple[bool, int, str]]:
    """Returns a sort key of path parts that orders numbers by value: Hydra's job 10 after job 9."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted key, value as text) of every leaf of a config."""
    yield from ((key, str(value)) for key, value in _leaf_values(node, prefix))


def _leaf_values(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaf_values(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _versions(path: Path) -> dict[str, str]:
    """Returns versions of packages, and the commit if the run used a git checkout."""
    known = read_yaml(path) or {}  # JSON is YAML
    commit = {"commit": known["git_commit"]} if known.get("git_commit") else {}
    return {**known.get("versions", {}), **commit}


def _generations(path: Path) -> list[dict[str, str]]:
    rows = []
    if path.is_file():
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                row = json.loads(line)
                rows.append({k: str(row[k]) for k in ("key", "prompt", "answer", "generated")})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not a generation") from error
    return rows


def read_needle(path: Path) -> Needle | None:
    if not path.is_file():
        return None
    advice = "run ropelab-evaluate on this run again"
    try:
        return _parse_needle(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON; {advice}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; {advice}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of a needle test ({error}); {advice}") from error


def _parse_needle(raw: dict[str, Any]) -> Needle:
    canaries = raw["canaries"]
    sensitivity = canaries["sensitivity"]
    low, high = raw["protocol"]["train_frames"]
    return Needle(
        rotary=raw["rotary"],
        seed=raw["seed"],
        step=raw["step"],
        train_frames=(low, high),
        cells={
            condition: [
                Cell(c["frames"], c["depth"], c["needle"], c["correct"]) for c in result["cells"]
            ]
            for condition, result in raw["conditions"].items()
        },
        blind=MeanInterval(canaries["blind"]["mean"], *canaries["blind"]["interval"]),
        ceiling=MeanInterval(canaries["ceiling"]["mean"], *canaries["ceiling"]["interval"]),
        majority=canaries["blind"]["majority"],
        logit_change=sensitivity["max_logit_change"],
        changed_at=(sensitivity["frames"], sensitivity["depth"]),
        computed=raw["token_forwards"]["computed"],
        recomputed=raw["token_forwards"]["recomputed"],
    )
