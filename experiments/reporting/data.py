"""Reads run directories: everything that a report needs from disk."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command.overrides import DELETED, show_value
from experiments.run.files import inside, read_curves, read_yaml
from experiments.run.settings import Settings, find_runs
from lightning_modules.metrics.bootstrap import MeanInterval

#: Stands for a value that a run does not have.
ABSENT = "-"


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
    settings: Settings
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    needle: Needle | None = None
    generations: list[dict[str, str]] = field(default_factory=list)

    def value(self, key: str) -> str:
        """Returns a setting as text; `ABSENT` if the run has none."""
        if (value := self.settings.value(key)) is not None:
            return value
        return self.needle.rotary if self.needle and key == "rotary" else ABSENT

    @property
    def overrides(self) -> dict[str, str]:
        """The overrides of the command line, as texts."""
        values = self.settings.overrides.items()
        return {key: ABSENT if v is DELETED else show_value(v) for key, v in values}

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
    return [load_run(folder) for folder in find_runs(roots)]


def load_run(folder: Path) -> Run:
    file = partial(inside, folder)
    settings = Settings.read(folder)
    _ = settings.choices, settings.config  # a damaged file is an error here, not later
    command = file("command.txt")
    return Run(
        folder=folder,
        settings=settings,
        command=command.read_text().strip() if command.is_file() else "",
        versions=_versions(file("versions.json")),
        curves=read_curves(file("metrics.csv")),
        needle=read_needle(file("needle.json")),
        generations=_generations(file("generations.jsonl")),
    )


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
                raise ValueError(f"{path}, line {number}: not a generated answer") from error
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
