"""The run directory: its settings, versions, checkpoints and results.

config.yaml  command.txt  versions.json     settings of the run
.hydra/                                     overrides, and the option of every config group
run.lock                                    held by the process that trains here
checkpoints/last.ckpt  run_id               a resumed run starts from these
metrics.csv  logged.jsonl  wandb/  …        logs
needle.json  needle.png  scores.json  answers/   results
done.json                                   written last
"""

import json
import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from datamodules.common.atomic import write_whole
from experiments.directory import kept as before
from experiments.directory.former import check_former, has_results, read_former
from experiments.directory.made_of import Differences
from experiments.run import lock
from experiments.run.compose import plain
from experiments.run.files import FROZEN, read_curves
from lightning_modules.callbacks.heartbeat import read_status
from lightning_modules.checkpoint import newest_whole

logger = logging.getLogger(__name__)

_PACKAGES = ("ropelab", "torch", "lightning", "transformers", "webdataset", "wandb")


class RunDirectory:
    """Locks the directory `config.paths.run` and reads its state.

    Only the lock is written before `claim`, so that a refused command leaves the directory
    unchanged. Only rank 0 locks and writes.

    Args:
        hold: whether to lock the directory. If false, it is only read, and not created.

    Raises:
        ValueError: the directory holds another run than the requested one, another process trains
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
            before.give_back(self.path)  # the backup of a command that was killed
        self._former = read_former(self.path, strict=config.resume)
        self._to_do: Differences = {}
        if self._former is not None:
            self._to_do = check_former(self.path, self._former, self._config)

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint, to resume from; None if there is none."""
        return newest_whole(self.path / "checkpoints") if self._config["resume"] else None

    def finished(self) -> dict[str, Any] | None:
        """Returns `done.json` if the requested run has already finished here, else None."""
        if self._former is None or not self._config["resume"] or self._to_do:
            return None
        return read_done(self.path)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Writes this run's settings into the directory. Call it after all checks.

        If `config.resume` is false, the run starts anew and the files of an earlier run are set
        aside. They come back if the body fails before `keep` is called.
        """
        self._write()
        try:
            yield
        except BaseException:
            if not rank_zero_only.rank:
                before.give_back(self.path)
            raise
        self.keep()

    def keep(self) -> None:
        """Removes the backup of an earlier run, once this run has taken its first step."""
        if not rank_zero_only.rank:
            before.forget(self.path)

    def _write(self) -> None:
        if rank_zero_only.rank:
            return
        anew = not self._config["resume"]
        if self._former is not None and (anew or has_results(self.path)):
            before.set_aside(self.path, anew)
        if self._to_do:
            # It belongs to the earlier request. A kill from here on must not leave it for this run.
            (self.path / "done.json").unlink(missing_ok=True)
        if self._former and (original := find_original(self.path, self._former["paths"]["run"])):
            _leave_wandb_run_to(original, self.path)
        self._wall_before = float(read_status(self.path / "status.json").get("wall_s", 0.0))
        write_whole(self.path / "config.yaml", OmegaConf.to_yaml(self._composed, resolve=True))
        write_whole(self.path / "command.txt", typed_command() + "\n")
        write_whole(self.path / "versions.json", json.dumps(read_versions(), indent=1))
        # Hydra does not write these: it would overwrite them even when this run is refused.
        hydra = HydraConfig.get()
        (self.path / ".hydra").mkdir(exist_ok=True)
        for name, node in (("overrides", hydra.overrides.task), ("hydra", {"hydra": hydra})):
            write_whole(self.path / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node))

    def finish(self, steps: int, score: float | None, **facts: Any) -> None:
        """Writes `done.json`.

        Args:
            steps: number of training steps.
            score: score of the needle test, if there was one.
            facts: more results, such as `samples` and `weights_sha256`.
        """
        if rank_zero_only.rank:
            return
        metrics = {
            name: points[-1][1]
            for name, points in read_curves(self.path / "metrics.csv").items()
            if name.startswith(("train/loss", "val/", "blind/"))
        }
        done = {
            "steps": steps,
            **facts,
            "metrics": metrics if score is None else metrics | {"score": score},
            # of all starts; a start that was killed counts up to its last heartbeat
            "wall_s": round(self._wall_before + time.monotonic() - self._started, 1),
            **read_versions(),
        }
        write_whole(self.path / "done.json", json.dumps(done, indent=1))


def open_locked(folder: Path) -> None:
    """Creates the run directory if it is missing, and locks it.

    Raises:
        ValueError: another process holds the lock, or the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.take(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}): choose another directory with "
            "hydra.run.dir=…, or another folder for all runs with paths.runs=…"
        ) from None


def _leave_wandb_run_to(original: Path, copy: Path) -> None:
    run_id = secrets.token_hex(4)
    write_whole(copy / "run_id", run_id)
    logger.warning(
        "%s is a copy of %s: from now on it is a separate run, in W&B %s", copy, original, run_id
    )


def find_original(folder: Path, recorded: str) -> Path | None:
    """Finds the run directory that `folder` was copied from. Returns None if there is none.

    A copy has the same W&B run id as the directory `recorded`, which still exists. A moved
    directory no longer exists at `recorded`. A link or another mount is the same directory: a file
    made in `folder` then appears in `recorded` too.
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
    """Returns `done.json` (steps, samples, metrics, …) of a finished run, else None."""
    path = folder / "done.json"
    return json.loads(path.read_text()) if path.is_file() else None


def typed_command() -> str:
    """Returns the typed command; for a job of a multirun, a command that runs this job alone."""
    hydra = HydraConfig.get()
    if hydra.job.config_name != FROZEN:
        return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    folder = os.path.relpath(hydra.run.dir)
    return shlex.join(["ropelab-train", *hydra.overrides.task, f"hydra.run.dir={folder}"])


def read_versions() -> dict[str, Any]:
    """Returns the package `versions`, and the `git_commit` (None outside a checkout)."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    versions = {"python": python_version()} | {name: version(name) for name in _PACKAGES}
    return {"versions": versions, "git_commit": commit}
