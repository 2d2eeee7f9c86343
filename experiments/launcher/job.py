"""A job of a multirun. Its config is composed once, when the user types the command.

The frozen config is used even if the job waits in a queue for days.
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

from datamodules.common.atomic import write_whole
from experiments.run.files import FROZEN, read_yaml


@dataclass(frozen=True, eq=False)
class Job:
    """One job of a multirun.

    Attributes:
        name: a readable name.
        folder: its run directory.
        config: the config that Hydra composed, with the node `hydra`.
    """

    name: str
    folder: Path
    config: DictConfig

    @property
    def task(self) -> DictConfig:
        """The config without the node `hydra`."""
        return OmegaConf.masked_copy(self.config, [str(k) for k in self.config if k != "hydra"])

    @property
    def launcher(self) -> dict[str, Any]:
        """The launcher's options for this job. They may depend on a swept trainer."""
        return self.plain(self.config.hydra.launcher)

    @property
    def words(self) -> list[str]:
        """The overrides of this job, without those of Hydra and the launcher."""
        words = self.config.hydra.overrides.task
        return [word for word in words if not word.startswith("launcher=")]

    def plain(self, node: Any) -> Any:
        """Returns a node as plain containers, with `${hydra:…}` resolved for this job."""
        if not OmegaConf.is_config(node):
            return node
        with _told(self.config):
            return OmegaConf.to_container(node, resolve=True)

    def command(self, program: str) -> list[str]:
        return [sys.executable, "-m", program, *arguments(self.folder)]

    def freeze(self) -> None:
        """Writes the config of this job as that of a single run, with all values resolved."""
        hydra = self.config.hydra
        frozen = self.plain(self.task)
        frozen["hydra"] = {
            "run": {"dir": str(self.folder)},
            "output_subdir": hydra.output_subdir,
            "verbose": self.plain(hydra.verbose),
            "callbacks": self.plain(hydra.callbacks),
            "job": {"chdir": hydra.job.chdir, "env_set": self.plain(hydra.job.env_set)},
            # Not resolved: it interpolates the process name, which differs in Lightning's ranks.
            "job_logging": OmegaConf.to_container(hydra.job_logging),
            "overrides": {"task": self.words},
            "runtime": {"choices": dict(hydra.runtime.choices)},
        }
        path = self.folder / ".hydra" / f"{FROZEN}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, OmegaConf.to_yaml(OmegaConf.create(frozen)))

    def done(self) -> dict[str, Any] | None:
        """Returns `done.json` if exactly this run has finished in the directory, else None.

        The program itself may also accept a finished run with a slightly different config.
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
        """Returns the result for Hydra's sweepers: the score in `done.json`, or None."""
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
    """Returns the arguments of a program that runs the frozen config in `folder`."""
    return ["--config-path", str(folder / ".hydra"), "--config-name", FROZEN]


def compose(
    context: HydraContext,
    sweep: DictConfig,
    overrides: list[str],
    number: int,
    name: str,
    folder_key: str | None = None,
) -> Job:
    """Composes the job with these overrides.

    Args:
        sweep: config of the sweep.
        overrides: overrides of the job.
        number: number of the job in the sweep.
        name: readable name of the job.
        folder_key: config key of the run directory, if the sweep does not name it.
    """
    config = context.config_loader.load_sweep_config(sweep, overrides)
    with open_dict(config.hydra):
        config.hydra.job.num, config.hydra.job.id = number, str(number)
    with _told(config):
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir).absolute()
        if folder_key is not None:
            folder = Path(OmegaConf.select(config, folder_key)).absolute()
        if "run_name" in config:
            config.run_name = config.run_name  # it depends on the sweep, so it is resolved here
    with read_write(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(folder)
    return Job(name, folder, config)


@contextmanager
def _told(config: DictConfig) -> Iterator[None]:
    """Makes `${hydra:…}` refer to `config` inside the block."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
