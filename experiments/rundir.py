"""A run directory: what runs in it, with which versions, and how far it has come.

config.yaml  command.txt  versions.json     what runs
.hydra/                                     what was overridden, and the option of every group
checkpoints/last.ckpt  run_id               what a resumed run goes on from
metrics.csv  generations.jsonl  wandb/      what was seen
needle.json  needle.png  done.json          what came out; done.json is the last file written
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from experiments.report_data import leaves
from experiments.run import plain

#: What a finished run must agree in with a run that is asked for, to stand for it.
_MADE_OF = ("model", "data", "optim", "trainer", "seed", "test")

_PACKAGES = ("ropelab", "torch", "lightning", "transformers", "webdataset", "wandb")
_LEFTOVERS = ("done.json", "metrics.csv", "generations.jsonl", "needle.json", "run_id")


class RunDirectory:
    """Opens the directory that `config.paths.run` names; only rank 0 writes into it.

    With `config.resume` false it starts anew: what an earlier run left is removed.

    Raises:
        ValueError: it holds a run of another model.
    """

    def __init__(self, config: DictConfig):
        self.path = Path(config.paths.run)
        self._started = time.monotonic()
        self._config: dict[str, Any] = plain(config)
        if rank_zero_only.rank:
            self._former = None
            return
        if not config.resume:
            self._clear()
        self._former = self._read_former()
        self.path.mkdir(parents=True, exist_ok=True)
        beside = self.path / "config.yaml.tmp"  # a kill while it is written leaves the old one
        beside.write_text(OmegaConf.to_yaml(config, resolve=True))
        beside.replace(self.path / "config.yaml")
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        (self.path / "command.txt").write_text(command + "\n")
        (self.path / "versions.json").write_text(json.dumps(read_versions(), indent=1))
        # Not left to Hydra, which would write over those of a run that is refused here.
        hydra = HydraConfig.get()
        (self.path / ".hydra").mkdir(exist_ok=True)
        OmegaConf.save(hydra.overrides.task, self.path / ".hydra" / "overrides.yaml")
        OmegaConf.save({"hydra": hydra}, self.path / ".hydra" / "hydra.yaml")

    @property
    def checkpoint(self) -> Path | None:
        """What to resume from."""
        last = self.path / "checkpoints" / "last.ckpt"
        if not (self._config["resume"] and last.is_file()):
            return None
        check_whole(last)
        return last

    def finished(self) -> dict[str, Any] | None:
        """`done.json` of the run that is asked for, where it has been here and come to its end."""
        done = self.path / "done.json"
        if self._former is None or not done.is_file() or _differences(self._former, self._config):
            return None
        return json.loads(done.read_text())

    def finish(self, steps: int, score: float | None) -> None:
        done = {
            "steps": steps,
            "metrics": {} if score is None else {"score": score},
            "wall_s": round(time.monotonic() - self._started, 1),
            **read_versions(),
        }
        if not rank_zero_only.rank:
            (self.path / "done.json").write_text(json.dumps(done, indent=1))

    def _clear(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for name in _LEFTOVERS:
            (self.path / name).unlink(missing_ok=True)

    def _read_former(self) -> dict[str, Any] | None:
        path = self.path / "config.yaml"
        former = yaml.safe_load(path.read_text()) if path.is_file() else None
        if former is None or not (self.path / "checkpoints").is_dir():
            return former
        differences = _differences({"model": former["model"]}, {"model": self._config["model"]})
        if differences:
            key, (then, now) = next(iter(differences.items()))
            raise ValueError(
                f"{self.path} was trained with {key}={then}, this run has {now}: choose another "
                "directory with hydra.run.dir=…, or start anew here with resume=false"
            )
        return former


def check_whole(checkpoint: Path) -> None:
    """A checkpoint is a zip file, whose directory stands at its end.

    Raises:
        ValueError: the file is cut or something else.
    """
    if not zipfile.is_zipfile(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: remove it, or start anew with resume=false")


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


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Leaves by dotted key that are not the same, in the parts that make a run what it is."""
    old, new = (dict(leaves({key: config.get(key) for key in _MADE_OF})) for config in (then, now))
    keys = dict.fromkeys([*new, *old])
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
