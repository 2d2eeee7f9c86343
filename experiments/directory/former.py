"""The run that was in a run directory before, and whether a command may go on with it.

Reads config.yaml and looks at names of files. Imports no torch, so that launchers can ask too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.command.overrides import show_value
from experiments.directory.made_of import Differences, compare, compare_all
from experiments.run.files import read_yaml

#: What a run leaves in its directory, beside its config. `resume=false` removes it.
LEFTOVERS = (
    "done.json",  # first: a kill on the way leaves no finished run
    "checkpoints",
    "generations.jsonl",
    "metrics.csv",
    "needle.json",
    "needle.png",
    "run_id",
    "samples.jsonl",
    "scores.json",
    "status.json",
    "tables.jsonl",
    "wandb",
)


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns `training`, `trial` (`debug=`) or `evaluation`."""
    if "run" in config:
        return "evaluation"
    return "trial" if config.get("trial") else "training"


def has_results(folder: Path) -> bool:
    """Returns whether anything was trained, or measured, in a run directory."""
    files = ("done.json", "metrics.csv", "needle.json", "scores.json")
    return any((folder / "checkpoints").glob("*.ckpt")) or any((folder / f).exists() for f in files)


def read_former(folder: Path, strict: bool = True) -> dict[str, Any] | None:
    """Returns the config of the run that was here before; None where there was none.

    Args:
        strict: whether a damaged one is refused; else it is empty.

    Raises:
        ValueError: the config is damaged, or files lie there that no run is known to have made.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        if found := next((name for name in LEFTOVERS if (folder / name).exists()), None):
            raise ValueError(
                f"{folder} has {found}, and config.yaml, which would say what made it, is "
                "missing: put it back, or choose another directory with hydra.run.dir=…"
            )
        return None
    try:
        former = read_yaml(path)
    except ValueError:
        former = None
    paths = former.get("paths") if isinstance(former, dict) else None
    if isinstance(paths, dict) and paths.get("run"):
        return former
    # `command.txt` shows that a run of ours was here, whatever became of its config.
    if not strict and (folder / "command.txt").is_file():
        return {}
    raise ValueError(
        f"{path}, which says what the run there was made with, is damaged or not of ropelab: put "
        "it back, or choose another directory with hydra.run.dir=…"
    )


def check_former(folder: Path, former: dict[str, Any], config: dict[str, Any]) -> Differences:
    """Compares the run in a directory with the one that is asked for.

    Returns:
        what a finished run has to go on for, values by dotted key.

    Raises:
        ValueError: it is of another kind, or was made with other settings.
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
        # Shards that a recipe has made stay where they are, also with resume=false.
        anew = "" if key.startswith("prepare.") else ", or start anew here with resume=false"
        raise ValueError(
            f"{folder} was {was} with {key}={then}, this run has {now}: choose another "
            f"directory with hydra.run.dir=…{anew}"
        )
    return further | weights


def _refuse_other_kind(folder: Path, former: dict[str, Any], config: dict[str, Any]) -> None:
    """A trial, a training and an evaluation each keep to a directory of their own kind.

    Raises:
        ValueError: the directory is of another kind. `resume=false` does not help.
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
            f"{folder} holds a {then}, which {asked} must not write over: leave "
            "hydra.run.dir out, or choose another directory with it"
        )
