"""Reads run directories: everything that a report needs from disk."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from experiments.command.overrides import DELETED, show_value
from experiments.reporting.measured import (
    NEEDLES,
    Measured,
    Needle,
    needles_measured,
    read_answers,
    read_needle,
    read_scores,
    scores_measured,
)
from experiments.run.files import inside, read_curves, read_yaml
from experiments.run.settings import Settings, find_runs
from lightning_modules.callbacks.heartbeat import read_status
from lightning_modules.metrics.answers import FULL

#: Stands for a value that a run does not have.
ABSENT = "-"


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: Settings
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    needle: Needle | None = None
    generations: list[dict[str, str]] = field(default_factory=list)
    measured: dict[str, Measured] = field(default_factory=dict)
    #: What the model said to each sample of the last validation, by key.
    said: dict[str, dict[str, Any]] = field(default_factory=dict)

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
    def scored_at(self) -> int | None:
        """The training step at which the run was tested or scored last."""
        if self.needle:
            return self.needle.step
        return next((line["step"] for line in self.said.values()), None)

    @property
    def status(self) -> str:
        if self.measured:
            return f"{'tested' if self.needle else 'scored'} after step {self.scored_at}"
        state = read_status(inside(self.folder, "status.json")).get("state")
        if state == "failed":
            return f"the run failed (last step logged: {self.last_step})"
        if self.curves:
            return (
                "no needle.json and no answers: not tested yet, or stopped (last step logged: "
                f"{self.last_step})"
            )
        return "no metrics.csv and no results: not started, or stopped before its first step"


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
    needle, answers = read_needle(file("needle.json")), read_answers(folder)
    measured = {NEEDLES: needles_measured(needle)} if needle else {}
    measured |= scores_measured(answers, read_scores(file("scores.json")))
    return Run(
        folder=folder,
        settings=settings,
        command=command.read_text().strip() if command.is_file() else "",
        versions=_versions(file("versions.json")),
        curves=read_curves(file("metrics.csv")),
        needle=needle,
        generations=_generations(file("generations.jsonl")),
        measured=measured,
        said={line["key"]: line for line in answers.get(FULL, [])}
        | (needle.said() if needle else {}),
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
