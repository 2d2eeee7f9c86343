"""Jobs of a multirun on a SLURM cluster."""

import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments.launcher.base import ProcessLauncher
from experiments.launcher.board import Board
from experiments.launcher.job import Job, arguments
from experiments.run import lock
from experiments.run.process import leave_on_signals

logger = logging.getLogger(__name__)

#: States that a job does not leave by itself, in squeue's words.
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
    "gone",
}
#: Of the launcher itself; all others are submitit's.
_OWN = ("_target_", "array", "wait", "poll_s")


@dataclass(frozen=True)
class State:
    """`name` as squeue has it, or `gone`; `reason` of a job that waits."""

    name: str
    reason: str = "None"

    @property
    def ended(self) -> bool:
        return self.name in _ENDED

    def __str__(self) -> str:
        return self.name if self.reason == "None" else f"{self.name} ({self.reason})"


_GONE = State("gone")


class SlurmLauncher(ProcessLauncher):
    """One batch job for each job of the multirun, or one array of all, submitted by submitit.

    The batch jobs need this process no more: it waits for them unless `wait` is false, may be
    killed, and finds those that are queued or running when the same command is typed again.

    `options` are those of submitit's `SlurmExecutor.update_parameters`, such as `partition`, `time`
    in minutes, `nodes`, `gpus_per_node` or `setup`; null leaves one to the cluster.
    """

    def __init__(
        self, array: bool = False, wait: bool = True, poll_s: float = 10.0, **options: Any
    ):
        self.array, self.wait, self.poll_s = array, wait, poll_s

    def run(self, jobs: list[Job]) -> dict[Job, str]:
        states = read_states()
        ids = {job: number for job in jobs if (number := read_id(job.folder))}
        ids = {job: number for job, number in ids.items() if not states.get(number, _GONE).ended}
        for job in ids:
            logger.info("%s: attached", job.name)
        left = [job for job in jobs if job not in ids]
        held = {job: about for job in left if (about := lock.holder(job.folder)) is not None}
        failed = {job: f"in use by {lock.describe(about)}" for job, about in held.items()}
        ids |= self._submit([job for job in left if job not in held])
        for job, number in ids.items():
            logger.info("%s: job %s, %s", job.name, number, job.folder)
        if not self.wait:
            return failed
        try:
            return failed | self._wait(ids)
        except KeyboardInterrupt:
            logger.warning("the jobs live on (scancel ends them): the same command waits again")
            sys.exit(130)

    def manner(self) -> str:
        return "as batch jobs"

    def queued(self, job: Job) -> str:
        number = read_id(job.folder)
        state = read_states().get(number, _GONE) if number else _GONE
        return "" if state.ended else f"job {number} is {state}"

    @property
    def _folder(self) -> Path:
        """Of submitit's scripts and of what the jobs print."""
        return Path(self.config.hydra.sweep.dir).absolute() / "slurm"

    def _submit(self, jobs: list[Job]) -> dict[Job, str]:
        """Freezes and submits; jobs that ask for the same resources can be one array."""
        alike: dict[str, list[Job]] = {}
        for job in jobs:
            job.freeze()
            asked = json.dumps(_options(job), sort_keys=True) if self.array else job.name
            alike.setdefault(asked, []).append(job)
        ids: dict[Job, str] = {}
        for batch in alike.values():
            for job, submitted in zip(batch, self._submit_batch(batch), strict=True):
                ids[job] = submitted
                (job.folder / "slurm.json").write_text(json.dumps({"job_id": submitted}))
        return ids

    def _submit_batch(self, batch: list[Job]) -> list[str]:
        try:
            from submitit import SlurmExecutor
            from submitit.core.utils import FailedJobError
        except ModuleNotFoundError:
            raise ValueError("launcher=slurm needs submitit: pip install ropelab[slurm]") from None
        executor = SlurmExecutor(self._folder)
        executor.update_parameters(**_options(batch[0]))
        try:
            made = executor.map_array(RunFrozen(self.program), [job.folder for job in batch])
        except FailedJobError as error:
            raise ValueError(f"sbatch: {error}") from None
        return [job.job_id for job in made]

    def _wait(self, ids: dict[Job, str]) -> dict[Job, str]:
        """Until every job has ended; why those failed that did."""
        failed: dict[Job, str] = {}
        seen: dict[Job, State] = {}
        left = dict(ids)
        with Board(list(ids)) as board:
            while left:
                states = self._read_patiently()
                for job, number in list(left.items()):
                    now, before = states.get(number, _GONE), seen.get(job)
                    if now != before:
                        seen[job] = now
                        logger.info("%s: job %s is %s", job.name, number, now)
                        board.set(job, "running" if now.name == "RUNNING" else str(now).lower())
                    elif now.ended:  # seen twice: one that is queued again may be away a moment
                        del left[job]
                        if why := self._why_failed(job, number, now):
                            failed[job] = why
                        board.set(job, "failed" if why else "finished", why or "")
                board.refresh()
                time.sleep(self.poll_s if left else 0)
        return failed

    def _why_failed(self, job: Job, number: str, ended: State) -> str | None:
        if ended.name in ("COMPLETED", "gone") and (job.folder / "done.json").is_file():
            return None
        return f"job {number} is {ended}, see {self._folder / number}_*"

    def _read_patiently(self) -> dict[str, State]:
        while True:
            try:
                return read_states()
            except ValueError as error:  # the controller restarts now and then
                logger.warning("%s: asked again in %g s", error, self.poll_s)
                time.sleep(self.poll_s)


class RunFrozen:
    """What every task of a batch job calls: the frozen run in `folder`, in its own process.

    A requeued job calls it again with the same folder, where the run goes on.
    """

    def __init__(self, program: str):
        self.program = program

    def __call__(self, folder: Path) -> None:
        leave_on_signals()  # in the place of submitit's, which go past SIGTERM
        sys.argv = [self.program, *arguments(folder)]
        import_module(self.program).main()


def read_id(folder: Path) -> str | None:
    """The batch job that was submitted last for a run directory."""
    path = folder / "slurm.json"
    return json.loads(path.read_text())["job_id"] if path.is_file() else None


def read_states() -> dict[str, State]:
    """All jobs of this user by id (`12`, or `12_3` in an array), also such as ended lately.

    Raises:
        ValueError: squeue is not there, or says no.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise ValueError("launcher=slurm needs a SLURM cluster: no squeue here") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(error.stderr.strip().splitlines()[-1]) from None
    rows = (line.split("|", 2) for line in lines.splitlines())
    return {number: State(name, reason) for number, name, reason in rows}


def _options(job: Job) -> dict[str, Any]:
    """For `sbatch`, as this job has them.

    Raises:
        ValueError: the number of tasks is not known here, such as `trainer.devices` -1.
    """
    options = {k: v for k, v in job.launcher.items() if k not in _OWN and v is not None}
    tasks = options.get("ntasks_per_node")
    if not isinstance(tasks, int) or tasks < 1:
        raise ValueError(
            f"hydra.launcher.ntasks_per_node={tasks} must be a number from 1: "
            "set trainer.devices to the GPUs of a node"
        )
    if cores := options.get("cpus_per_task"):  # srun no longer takes it from sbatch (since 22.05)
        options["srun_args"] = [*options.get("srun_args", []), f"--cpus-per-task={cores}"]
    return options
