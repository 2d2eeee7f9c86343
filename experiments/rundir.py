"""A run directory: what runs in it, with which versions, and how far it has come.

config.yaml  command.txt  versions.json     what runs
.hydra/                                     what was overridden, and the option of every group
run.lock                                    held by the process that trains here
checkpoints/last.ckpt  run_id               what a resumed run goes on from
metrics.csv  tables.jsonl  wandb/  …        what was seen
needle.json  needle.png  scores.json        what came out
done.json                                   the last file written
"""

import json
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from experiments import lock
from experiments.files import read_yaml
from experiments.launcher.job import FROZEN
from experiments.made_of import Differences, compare, compare_all
from experiments.overrides import show_value
from experiments.report_data import read_curves
from experiments.run import plain
from lightning_modules.checkpoint import newest_whole
from lightning_modules.heartbeat import read_status

logger = logging.getLogger(__name__)

_PACKAGES = ("ropelab", "torch", "lightning", "transformers", "webdataset", "wandb")
_LEFTOVERS = (
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


class RunDirectory:
    """Locks the directory that `config.paths.run` names, and finds out what is in it.

    Nothing but the lock is written before `claim`, so that a command that is refused leaves the
    directory as it was. Only rank 0 locks and writes.

    Args:
        hold: lock it and write into it; false only looks, and makes no directory.

    Raises:
        ValueError: it holds another run than the one that is asked for, another process trains
            in it, or it cannot be written.
    """

    def __init__(self, config: DictConfig, hold: bool = True):
        self.path = Path(config.paths.run)
        self._started = time.monotonic()
        self._wall_before = 0.0
        self._composed = config
        self._config: dict[str, Any] = plain(config)
        if hold and not rank_zero_only.rank:
            open_locked(self.path)
        self._former = read_former(self.path, strict=config.resume)
        self._to_do: Differences = {}
        self._refuse_other_kind()
        if self._former and config.resume:
            self._to_do = self._compare(self._former)

    @property
    def checkpoint(self) -> Path | None:
        """What to resume from: the newest checkpoint that is whole."""
        return newest_whole(self.path / "checkpoints") if self._config["resume"] else None

    def finished(self) -> dict[str, Any] | None:
        """`done.json` of the run that is asked for, where it has been here and come to its end."""
        if self._former is None or not self._config["resume"] or self._to_do:
            return None
        return read_done(self.path)

    def claim(self) -> None:
        """Makes the directory this run's: all checks are over.

        With `config.resume` false it starts anew: what an earlier run left is removed.
        """
        if rank_zero_only.rank:
            return
        if not self._config["resume"]:
            self._clear()
        elif self._to_do:
            # It is of what was asked for before; a kill from here on must not leave it to this.
            (self.path / "done.json").unlink(missing_ok=True)
        if self._former and (original := find_original(self.path, self._former["paths"]["run"])):
            _leave_wandb_run_to(original, self.path)
        self._wall_before = float(read_status(self.path / "status.json").get("wall_s", 0.0))
        write_whole(self.path / "config.yaml", OmegaConf.to_yaml(self._composed, resolve=True))
        write_whole(self.path / "command.txt", typed_command() + "\n")
        write_whole(self.path / "versions.json", json.dumps(read_versions(), indent=1))
        # Not left to Hydra, which would write over those of a run that is refused here.
        hydra = HydraConfig.get()
        (self.path / ".hydra").mkdir(exist_ok=True)
        OmegaConf.save(hydra.overrides.task, self.path / ".hydra" / "overrides.yaml")
        OmegaConf.save({"hydra": hydra}, self.path / ".hydra" / "hydra.yaml")

    def finish(self, steps: int, score: float | None, **facts: Any) -> None:
        """Writes `done.json`.

        Args:
            facts: what else came out, such as `samples` and `weights_sha256`.
        """
        if rank_zero_only.rank:
            return
        metrics = {
            name: points[-1][1]
            for name, points in read_curves(self.path / "metrics.csv").items()
            if name.startswith(("train/loss", "val/"))
        }
        done = {
            "steps": steps,
            **facts,
            "metrics": metrics if score is None else metrics | {"score": score},
            # of all starts; what a kill took is known to the last sign of life
            "wall_s": round(self._wall_before + time.monotonic() - self._started, 1),
            **read_versions(),
        }
        write_whole(self.path / "done.json", json.dumps(done, indent=1))

    def _clear(self) -> None:
        for name in _LEFTOVERS:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _refuse_other_kind(self) -> None:
        """A trial, a training and an evaluation each keep to a directory of their own kind.

        Raises:
            ValueError: the directory is of another kind. `resume=false` does not help.
        """
        if self._former is None:
            return
        then, now = kind_of(self._former), kind_of(self._config)
        if then == "trial" and now == "training":
            if self._config["resume"]:
                raise ValueError(
                    f"{self.path} holds a trial (debug=): choose another directory with "
                    "hydra.run.dir=…, or start anew here with resume=false"
                )
        elif then != now:
            asked = "debug=" if now == "trial" else f"this {now}"
            raise ValueError(
                f"{self.path} holds a {then}, which {asked} must not write over: leave "
                "hydra.run.dir out, or choose another directory with it"
            )

    def _compare(self, former: dict[str, Any]) -> Differences:
        """What a finished run has to go on for.

        Raises:
            ValueError: the weights, or the results of an evaluation, were made with other settings.
        """
        if kind_of(self._config) == "evaluation":
            weights, further = compare_all(former, self._config), {}
            was = "evaluated"
        else:
            weights, further = compare(former, self._config)
            was = "trained"
        if weights and has_results(self.path):
            key, values = next(iter(weights.items()))
            then, now = map(show_value, values)
            raise ValueError(
                f"{self.path} was {was} with {key}={then}, this run has {now}: choose another "
                "directory with hydra.run.dir=…, or start anew here with resume=false"
            )
        return further | weights


def kind_of(config: dict[str, Any]) -> str:
    """`training`, `trial` (`debug=`) or `evaluation`."""
    if "run" in config:
        return "evaluation"
    return "trial" if config.get("trial") else "training"


def open_locked(folder: Path) -> None:
    """Makes a run directory where there is none, and locks it.

    Raises:
        ValueError: another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): choose another directory with "
            "hydra.run.dir=…, or another folder for all runs with paths.runs=…"
        ) from None


def has_results(folder: Path) -> bool:
    """Whether anything was trained, or measured, in a run directory."""
    files = ("done.json", "metrics.csv", "needle.json", "scores.json")
    return any((folder / "checkpoints").glob("*.ckpt")) or any((folder / f).exists() for f in files)


def read_former(folder: Path, strict: bool = True) -> dict[str, Any] | None:
    """The config of the run that was here before; None where there was none.

    Args:
        strict: whether a damaged one is refused; else it is empty.

    Raises:
        ValueError: there are checkpoints, and nothing that says what made them.
    """
    path = folder / "config.yaml"
    try:
        former = read_yaml(path)
    except ValueError:
        former = "damaged"
    if isinstance(former, dict):
        return former
    if former is not None and not strict:
        return {}
    if former is not None or has_results(folder):
        what = "missing" if former is None else "damaged"
        raise ValueError(
            f"{path}, which says what the run there was made with, is {what}: put it back, or "
            "choose another directory with hydra.run.dir=…"
        )
    return None


def _leave_wandb_run_to(original: Path, copy: Path) -> None:
    run_id = secrets.token_hex(4)
    write_whole(copy / "run_id", run_id)
    logger.warning(
        "%s is a copy of %s: from here on it is a run of its own, in W&B %s", copy, original, run_id
    )


def find_original(folder: Path, recorded: str) -> Path | None:
    """The run directory that `folder` is a copy of; None for one that was moved, or never was.

    A copy has the W&B run of a directory that is still where the run was started last. The same
    directory under another name, by a link or another mount, shows a file that is made here.
    """
    other = Path(recorded)
    ids = [path / "run_id" for path in (folder, other)]
    if not all(path.is_file() for path in ids) or os.path.samefile(folder, other):
        return None
    if ids[0].read_text() != ids[1].read_text():
        return None
    probe = folder / f".probe-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return None if (other / probe.name).exists() else other
    finally:
        probe.unlink()


def read_done(folder: Path) -> dict[str, Any] | None:
    """`done.json` of a run that came to its end: steps, samples, metrics, weights_sha256, …"""
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.is_file() else None


def typed_command() -> str:
    """As typed; for a job of a multirun, what runs it by itself."""
    hydra = HydraConfig.get()
    if hydra.job.config_name != FROZEN:
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    folder = os.path.relpath(hydra.run.dir)
    return shlex.join(["ropelab-train", *hydra.overrides.task, f"hydra.run.dir={folder}"])


def write_whole(path: Path, text: str) -> None:
    """A kill while it is written leaves the old file."""
    beside = path.with_name(path.name + ".partial")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_versions() -> dict[str, Any]:
    """`versions` of what computes, and `git_commit` where this is a checkout."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    versions = {"python": python_version()} | {name: version(name) for name in _PACKAGES}
    return {"versions": versions, "git_commit": commit}
