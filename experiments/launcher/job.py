"""A job of a multirun: composed once when it is asked for, and then frozen.

What waits in a queue for days runs with the configs of the day it was typed.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments.run.files import FROZEN, read_yaml


@dataclass(frozen=True, eq=False)
class Job:
    """`config` is what Hydra composed, with its own node; `name` is for people."""

    name: str
    folder: Path
    config: DictConfig

    @property
    def task(self) -> DictConfig:
        """The config without Hydra's node."""
        return OmegaConf.masked_copy(self.config, [str(k) for k in self.config if k != "hydra"])

    @property
    def launcher(self) -> dict[str, Any]:
        """The launcher's options as they are for this job: a swept trainer asks for its own."""
        return self.plain(self.config.hydra.launcher)

    @property
    def words(self) -> list[str]:
        """What was typed for this job, without the options of Hydra and the launcher."""
        words = self.config.hydra.overrides.task
        return [word for word in words if not word.startswith("launcher=")]

    def plain(self, node: Any) -> Any:
        """Plain containers, with what `${hydra:…}` means in this job."""
        if not OmegaConf.is_config(node):
            return node
        with _told(self.config):
            return OmegaConf.to_container(node, resolve=True)

    def command(self, program: str) -> list[str]:
        return [sys.executable, "-m", program, *arguments(self.folder)]

    def freeze(self) -> None:
        """Writes the config of a single run, with nothing left to resolve."""
        hydra = self.config.hydra
        frozen = self.plain(self.task)
        frozen["hydra"] = {
            "run": {"dir": str(self.folder)},
            "output_subdir": hydra.output_subdir,
            "verbose": self.plain(hydra.verbose),
            "callbacks": self.plain(hydra.callbacks),
            "job": {"chdir": hydra.job.chdir, "env_set": self.plain(hydra.job.env_set)},
            # Interpolates the name of the process, which ranks of Lightning's change.
            "job_logging": OmegaConf.to_container(hydra.job_logging),
            "overrides": {"task": self.words},
            "runtime": {"choices": dict(hydra.runtime.choices)},
        }
        path = self.folder / ".hydra" / f"{FROZEN}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(OmegaConf.to_yaml(OmegaConf.create(frozen)))
        beside.replace(path)

    def done(self) -> dict[str, Any] | None:
        """`done.json`, where this very run has been here and come to its end.

        A run that was asked for in other words may stand for it too; that the program finds out.
        """
        done, former = self.folder / "done.json", self.folder / "config.yaml"
        if not (done.is_file() and former.is_file() and self.config.get("resume", True)):
            return None
        try:
            if read_yaml(former) != self.plain(self.task):
                return None
        except ValueError:
            return None  # the program refuses it
        return json.loads(done.read_text())

    def outcome(self, failure: BaseException | None) -> JobReturn:
        """What Hydra's sweepers read: the score of `done.json`, None where there is none."""
        path = self.folder / "done.json"
        score = None
        if failure is None and path.is_file():
            score = json.loads(path.read_text()).get("metrics", {}).get("score")
        return JobReturn(
            overrides=list(self.config.hydra.overrides.task),
            cfg=self.task,
            hydra_cfg=OmegaConf.masked_copy(self.config, "hydra"),
            working_dir=str(Path.cwd()),
            task_name=self.config.hydra.job.name,
            status=JobStatus.FAILED if failure else JobStatus.COMPLETED,
            _return_value=failure or score,
        )


def arguments(folder: Path) -> list[str]:
    """The command line of a program that runs the frozen config in `folder`."""
    return ["--config-path", str(folder / ".hydra"), "--config-name", FROZEN]


def compose(
    context: HydraContext,
    sweep: DictConfig,
    overrides: list[str],
    number: int,
    name: str,
    folder_key: str | None = None,
) -> Job:
    """Returns the job of `overrides`, number `number` of the sweep that `sweep` was composed for.

    Args:
        folder_key: where the config says its directory, if it is not the sweep that does.
    """
    config = context.config_loader.load_sweep_config(sweep, overrides)
    with open_dict(config.hydra):
        config.hydra.job.num, config.hydra.job.id = number, str(number)
    with _told(config):
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        if folder_key is not None:
            folder = Path(OmegaConf.select(config, folder_key)).absolute()
    with read_write(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    return Job(name, folder, config)


@contextmanager
def _told(config: DictConfig) -> Iterator[None]:
    """Inside, `${hydra:…}` is resolved in `config`."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
