"""The base class of launchers: composes jobs, skips finished ones, and reports failures."""

import logging
import os
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments.directory import location
from experiments.directory.former import check_former, read_former
from experiments.directory.made_of import Differences
from experiments.launcher.job import Job, compose
from experiments.launcher.wandb_key import check_key
from experiments.run.files import check_files

logger = logging.getLogger(__name__)


def unwritable(folder: Path) -> str | None:
    """Returns why a run directory cannot be created or written, or None if it can."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return None
    return (
        f"{folder} cannot be written: choose another directory with hydra.run.dir=… "
        "(hydra.sweep.dir=… of a multirun), or another folder for all runs with paths.runs=…"
    )


def refusal(job: Job) -> str | None:
    """Returns why a job must not run in its directory, or None if it may.

    Call it before the job's frozen config is written there.
    """
    try:
        compare_with_former(job)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def compare_with_former(job: Job) -> Differences:
    """Returns the differences for which a finished run in the job's directory must continue.

    Imports no torch.

    Raises:
        ValueError: the job must not run in its directory.
    """
    if why := unwritable(job.folder):
        raise ValueError(why)
    config = job.plain(job.task)
    former = read_former(job.folder, strict=config.get("resume", True))
    return {} if former is None else check_former(job.folder, former, config)


class ProcessLauncher(Launcher):
    """Starts the called program once for each job, with the frozen config of the job.

    A failed job does not stop the others. Finished jobs are not started, so the same command
    continues a stopped sweep.
    """

    hydra_context: HydraContext
    config: DictConfig
    program: str  # module of the program

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.program = task_function.__module__
        spec = sys.modules["__main__"].__spec__
        if self.program == "__main__" and spec:
            self.program = spec.name

    @abstractmethod
    def run(self, jobs: list[Job]) -> dict[Job, str]:
        """Runs unfinished jobs, and returns the failed ones with their reasons.

        Raises:
            ValueError: no job can be started.
            SystemExit: the sweep was stopped before its end.
        """

    def manner(self) -> str:
        """Returns a readable text on how jobs would run, such as `2 at a time`."""
        return ""

    def queued(self, job: Job) -> str:
        """Returns the batch system's state of a job that has not ended, else an empty text."""
        return ""

    def compose_jobs(
        self, job_overrides: Sequence[Sequence[str]], first: int = 0, single: bool = False
    ) -> list[Job]:
        """Composes jobs and numbers them from `first`. No two jobs may share a directory.

        Args:
            job_overrides: overrides of each job.
            first: number of the first job.
            single: whether the only job runs in `hydra.run.dir`, as without a multirun.
        """
        shared = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
        fixed = location.shared_by_jobs(self.config)
        jobs = []
        for number, overrides in enumerate(job_overrides, start=first):
            own = [word for word in overrides if word not in shared]
            name = "" if single else f"#{number} {' '.join(own)}".rstrip()
            key = "hydra.run.dir" if single else None
            with location.sharing(fixed):
                job = compose(self.hydra_context, self.config, list(overrides), number, name, key)
            jobs.append(job)
        self._check_folders(jobs)
        return jobs

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = self.compose_jobs(job_overrides, initial_job_idx)
        left = []
        for job in jobs:
            if job.done() is None:
                left.append(job)
            else:
                logger.info("%s: already finished", job.name)
        refused = {job: why for job in left if (why := refusal(job))}
        for job, why in refused.items():
            logger.error("%s: refused, %s", job.name, why)
        left = [job for job in left if job not in refused]
        try:
            check_key(left)
            failed = refused | (self.run(left) if left else {})
        except ValueError as error:
            raise CompactHydraException(f"error: {error}") from None
        lines = [f"{len(failed)} of {len(jobs)} jobs failed:"]
        lines += [f"  {job.name}: {why}; {job.folder}" for job, why in failed.items()]
        failure = CompactHydraException("\n".join(lines))
        return [job.outcome(failure if job in failed else None) for job in jobs]

    def _check_folders(self, jobs: list[Job]) -> None:
        taken: dict[Path, Job] = {}
        for job in jobs:
            try:
                check_files(job.folder)  # before anything there is read or frozen
            except ValueError as error:
                raise CompactHydraException(f"error: {error}") from None
            other = taken.setdefault(job.folder, job)
            if other is not job and other.plain(other.task) == job.plain(job.task):
                raise CompactHydraException(
                    f"two jobs are the same run, {job.folder}: {' '.join(job.words)}; leave one out"
                )
            if other is not job:
                raise CompactHydraException(
                    f"jobs {other.name} and {job.name} would both run in {job.folder}: "
                    "name the directory by what is swept, with hydra.sweep.subdir="
                )
