"""Decides whether a command may continue the earlier run in a run directory.

Reads config.yaml and file names only. Imports no torch, so that launchers can use it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command.overrides import show_value
from experiments.directory.made_of import Differences, compare, compare_all
from experiments.run.files import read_yaml

#: Files and folders that a run leaves in its directory beside its config. `resume=false` removes
#: them.
LEFTOVERS = (
    "done.json",  # first, so that a kill in between does not leave a run that looks finished
    "answers",
    "checkpoints",
    "generations.jsonl",
    "logged.jsonl",
    "metrics.csv",
    "needle.json",
    "needle.png",
    "run_id",
    "samples.jsonl",
    "scores.json",
    "status.json",
    "wandb",
)


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns the kind of run: `training`, `trial` (`debug=`) or `evaluation`."""
    if "run" in config:
        return "evaluation"
    return "trial" if config.get("trial") else "training"


def has_results(folder: Path) -> bool:
    """Returns whether a run directory has results of a training or an evaluation."""
    files = ("done.json", "metrics.csv", "needle.json", "scores.json")
    return any((folder / "checkpoints").glob("*.ckpt")) or any((folder / f).exists() for f in files)


def read_former(folder: Path, strict: bool = True) -> dict[str, Any] | None:
    """Returns the config of the earlier run in `folder`, or None if there was none.

    Args:
        strict: whether to refuse a damaged config. If false, a damaged config counts as empty.

    Raises:
        ValueError: the config is damaged, or results lie there without a config.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        if found := next((name for name in LEFTOVERS if (folder / name).exists()), None):
            raise ValueError(
                f"{folder} has {found}, but its config.yaml is missing: put it back, or choose "
                "another directory with hydra.run.dir=…"
            )
        return None
    try:
        former = read_yaml(path)
    except ValueError:
        former = None
    paths = former.get("paths") if isinstance(former, dict) else None
    if isinstance(paths, dict) and paths.get("run"):
        return former
    # `command.txt` shows that ropelab made this directory, even if the config is damaged.
    if not strict and (folder / "command.txt").is_file():
        return {}
    raise ValueError(
        f"{path} is damaged or was not written by ropelab: put the right one back, or choose "
        "another directory with hydra.run.dir=…"
    )


def check_former(folder: Path, former: dict[str, Any], config: dict[str, Any]) -> Differences:
    """Compares the earlier run in a directory with the requested run.

    Returns:
        Differences for which a finished run must continue: (old, new) values by dotted key.

    Raises:
        ValueError: the earlier run is of another kind, or was made with other settings.
    """
    _refuse_other_kind(folder, former, config)
    if not former or not config.get("resume", True):
        return {}
    if kind_of(config) == "evaluation":
        weights, further = compare_all(former, config), {}
        was = "evaluated"
    else:
        weights, further = compare(former, config)
        was = "trained"
    if weights and has_results(folder):
        key, values = next(iter(weights.items()))
        then, now = map(show_value, values)
        # resume=false does not help here: it keeps the shards that a recipe has made.
        anew = "" if key.startswith("prepare.") else ", or start anew here with resume=false"
        raise ValueError(
            f"{folder} was {was} with {key}={then}, this run has {now}: choose another "
            f"directory with hydra.run.dir=…{anew}"
        )
    return further | weights


def _refuse_other_kind(folder: Path, former: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuses a directory with a run of another kind (trial, training or evaluation).

    Raises:
        ValueError: the kinds differ. `resume=false` helps only for a training in place of a trial.
    """
    then, now = kind_of(former), kind_of(config)
    if then == "trial" and now == "training":
        if config.get("resume", True):
            raise ValueError(
                f"{folder} holds a trial (debug=): choose another directory with "
                "hydra.run.dir=…, or start anew here with resume=false"
            )
    elif then != now:
        asked = "debug=" if now == "trial" else f"this {now}"
        raise ValueError(
            f"{folder} holds a {then}, which {asked} must not overwrite: leave hydra.run.dir out, "
            "or choose another directory with it"
        )
