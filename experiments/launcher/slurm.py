"""Runs the jobs of a multirun on a SLURM cluster."""

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

#: Final states of a SLURM job, as squeue names them.
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
#: Options of the launcher itself. All others belong to submitit.
_OWN = ("_target_", "array", "wait", "poll_s")


@dataclass(frozen=True)
class State:
    """The state of a SLURM job: its `name` in squeue, or `gone`, and the `reason` why it waits."""

    name: str
    reason: str = "None"

    @property
    def ended(self) -> bool:
        return self.name in _ENDED

    def __str__(self) -> str:
        return self.name if self.reason == "None" else f"{self.name} ({self.reason})"


_GONE = State("gone")


class SlurmLauncher(ProcessLauncher):
    """Submits one batch job for each job of the multirun, or one array of all, with submitit.

    The launcher waits for the batch jobs unless `wait` is false. They do not need it: if it is
    killed, they continue, and the same command finds queued and running jobs again.

    `options` are those of submitit's `SlurmExecutor.update_parameters`, such as `partition`, `time`
    in minutes, `nodes`, `gpus_per_node` or `setup`. null means the default of the cluster.
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
            logger.warning(
                "the jobs keep running (scancel ends them): the same command waits for them again"
            )
            sys.exit(130)

    def manner(self) -> str:
        return "as batch jobs"

    def queued(self, job: Job) -> str:
        number = read_id(job.folder)
        state = read_states().get(number, _GONE) if number else _GONE
        return "" if state.ended else f"job {number} is {state}"

    @property
    def _folder(self) -> Path:
        """The folder of submitit's scripts and of the jobs' output."""
        return Path(self.config.hydra.sweep.dir).absolute() / "slurm"

    def _submit(self, jobs: list[Job]) -> dict[Job, str]:
        """Freezes and submits jobs, and returns their ids.

        With `array`, jobs that ask for the same resources become one array.
        """
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
        """Waits until every job has ended. Returns the failed jobs with their reasons."""
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
                    elif now.ended:  # seen twice, because a requeued job may vanish for a moment
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
            except ValueError as error:  # the SLURM controller may be restarting
                logger.warning("%s: retry in %g s", error, self.poll_s)
                time.sleep(self.poll_s)


class RunFrozen:
    """Runs the frozen config in `folder`. Every task of a batch job calls it in its own process.

    A requeued job calls it again with the same folder, and the run resumes there.
    """

    def __init__(self, program: str):
        self.program = program

    def __call__(self, folder: Path) -> None:
        leave_on_signals()  # replaces submitit's handlers, which ignore SIGTERM
        sys.argv = [self.program, *arguments(folder)]
        import_module(self.program).main()


def read_id(folder: Path) -> str | None:
    """Returns the id of the batch job that was last submitted for a run directory, or None."""
    path = folder / "slurm.json"
    return json.loads(path.read_text())["job_id"] if path.is_file() else None


def read_states() -> dict[str, State]:
    """Returns the states of this user's jobs by id (`12`, or `12_3` in an array).

    Jobs that ended recently are included.

    Raises:
        ValueError: squeue is missing or fails.
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
    """Returns the job's options for `sbatch`.

    Raises:
        ValueError: the number of tasks is unknown, for example with `trainer.devices` -1.
    """
    options = {k: v for k, v in job.launcher.items() if k not in _OWN and v is not None}
    tasks = options.get("ntasks_per_node")
    if not isinstance(tasks, int) or tasks < 1:
        raise ValueError(
            f"hydra.launcher.ntasks_per_node={tasks} must be a number of 1 or more: set "
            "trainer.devices to the GPUs of a node"
        )
    if cores := options.get("cpus_per_task"):  # srun no longer takes it from sbatch (since 22.05)
        options["srun_args"] = [*options.get("srun_args", []), f"--cpus-per-task={cores}"]
    return options
