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
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from experiments import lock
from experiments.launcher.job import FROZEN
from experiments.report_data import leaves, read_curves
from experiments.run import plain
from lightning_modules.checkpoint import newest_whole
from lightning_modules.heartbeat import read_status

#: What a finished run must agree in with a run that is asked for, to stand for it,
_MADE_OF = ("module", "model", "data", "optim", "trainer", "seed", "test")
#: but for what decides only how it is computed.
_HOW = (
    "data.audit",
    "data.stream.index_cache",
    "data.stream.num_workers",
    "data.stream.timeout_s",
    "trainer.accelerator",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
    "trainer.plugins",
    "trainer.strategy",
)

_PACKAGES = ("ropelab", "torch", "lightning", "transformers", "webdataset", "wandb")
_LEFTOVERS = (
    "checkpoints",
    "done.json",
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
    """Opens the directory that `config.paths.run` names; only rank 0 writes into it.

    With `config.resume` false it starts anew: what an earlier run left is removed.

    Args:
        hold: lock it and write into it; false only looks, and makes no directory.

    Raises:
        ValueError: it holds a run of another model, or another process trains in it.
    """

    def __init__(self, config: DictConfig, hold: bool = True):
        self.path = Path(config.paths.run)
        self._started = time.monotonic()
        self._wall_before = 0.0
        self._config: dict[str, Any] = plain(config)
        self._former = None
        if not hold:
            self._former = self._read_former()
        if rank_zero_only.rank or not hold:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock.take(self.path)
        if not config.resume:
            self._clear()
        self._wall_before = float(read_status(self.path / "status.json").get("wall_s", 0.0))
        self._former = self._read_former()
        if self._former is not None and _differences(self._former, self._config):
            # It is of what was asked for before; a kill from here on must not leave it to this.
            (self.path / "done.json").unlink(missing_ok=True)
        write_whole(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_whole(self.path / "command.txt", typed_command() + "\n")
        write_whole(self.path / "versions.json", json.dumps(read_versions(), indent=1))
        # Not left to Hydra, which would write over those of a run that is refused here.
        hydra = HydraConfig.get()
        (self.path / ".hydra").mkdir(exist_ok=True)
        OmegaConf.save(hydra.overrides.task, self.path / ".hydra" / "overrides.yaml")
        OmegaConf.save({"hydra": hydra}, self.path / ".hydra" / "hydra.yaml")

    @property
    def checkpoint(self) -> Path | None:
        """What to resume from: the newest checkpoint that is whole."""
        return newest_whole(self.path / "checkpoints") if self._config["resume"] else None

    def finished(self) -> dict[str, Any] | None:
        """`done.json` of the run that is asked for, where it has been here and come to its end."""
        if self._former is None or _differences(self._former, self._config):
            return None
        return read_done(self.path)

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

    def _read_former(self) -> dict[str, Any] | None:
        path = self.path / "config.yaml"
        former = yaml.safe_load(path.read_text()) if path.is_file() else None
        if former is None or not (self.path / "checkpoints").is_dir():
            return former
        differences = _differences(*map(_network, (former, self._config)))
        if differences:
            key, (then, now) = next(iter(differences.items()))
            raise ValueError(
                f"{self.path} was trained with {key}={then}, this run has {now}: choose another "
                "directory with hydra.run.dir=…, or start anew here with resume=false"
            )
        return former


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


def _network(config: dict[str, Any]) -> dict[str, Any]:
    """What weights fit to no other: the stages, and what they are trained as."""
    return {"model": config["model"], "module": {"_target_": config["module"]["_target_"]}}


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Leaves by dotted key that are not the same, in the parts that make a run what it is."""
    old, new = (dict(leaves({key: config.get(key) for key in _MADE_OF})) for config in (then, now))
    keys = [key for key in dict.fromkeys([*new, *old]) if not key.startswith(_HOW)]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
