"""Implements `--dry-run`: lists the runs of a ropelab-train command and writes nothing."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from experiments.command.values import check_values
from experiments.launcher.base import ProcessLauncher, compare_with_former, unwritable
from experiments.launcher.job import Job
from experiments.launcher.wandb_key import check_key
from experiments.private.hydra import combinations
from experiments.run import lock

_WORDS = {"--dry-run": True, "dry_run=true": True, "dry_run=false": False}


def take_dry_run(command: list[str]) -> bool:
    """Removes `--dry-run` or `dry_run=true` from a command line, and returns whether it was set.

    If it was set, the command gets this module's sweeper instead. `dry_run` is not a config key,
    because a run must have the same config as in the listing.

    Args:
        command: `sys.argv`. It is changed in place.
    """
    said = [word for word in command if word.lower().lstrip("+") in _WORDS]
    command[:] = [word for word in command if word not in said]
    if not said or not _WORDS[said[-1].lower().lstrip("+")]:
        return False
    added = [f"hydra.sweeper._target_=hydra_plugins.ropelab.{ListingSweeper.__name__}"]
    if not {"-m", "--multirun"} & set(command):
        command.insert(1, "-m")
        added.append("+hydra.sweeper.single=true")
    # Hydra needs all overrides in one block before or after its options, so they go there.
    overrides = [n for n, word in enumerate(command) if "=" in word and not word.startswith("-")]
    place = overrides[-1] + 1 if overrides else len(command)
    command[place:place] = added
    return True


class ListingSweeper(Sweeper):
    """Finds the jobs as Hydra's basic sweeper does, and prints them instead of launching them.

    Args:
        params: sweeps from the config, as in Hydra's basic sweeper.
        single: whether the command is a single run in `hydra.run.dir` and not a multirun.
    """

    def __init__(self, params: dict[str, str] | None = None, single: bool = False, **_: Any):
        self.params, self.single = dict(params or {}), single

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader = hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        if not isinstance(self.launcher, ProcessLauncher):
            sys.exit("error: a dry run needs a launcher of ropelab: leave hydra/launcher out")
        parser = OverridesParser.create(config_loader=self.loader)
        swept = [f"{key}={values}" for key, values in self.params.items()]
        overrides = parser.parse_overrides([*swept, *arguments])
        words = combinations(overrides)
        if self.single and len(words) > 1:
            swept = next(each.input_line for each in overrides if each.is_sweep_override())
            sys.exit(f"error: {swept} asks for {len(words)} runs: add -m")
        jobs = self.launcher.compose_jobs(words, single=self.single)
        states = [describe(job, self.launcher) for job in jobs]
        print(show(jobs, states, "" if self.single else self.launcher.manner()), flush=True)
        try:
            check_key([job for job, state in zip(jobs, states, strict=True) if _runs(state)])
        except ValueError as error:
            sys.exit(f"refused: {error}")
        sys.exit(1 if any(state.startswith("refused") for state in states) else 0)


def describe(job: Job, launcher: ProcessLauncher) -> str:
    """Returns what the command would do with a job. Only reads files.

    The text is `finished`, `running …`, `queued …`, `new`, `starts anew …`, `starts at step 0 …`,
    `goes on from step N`, or `refused: …`.
    """
    if job.done() is not None:
        return "finished"
    if why := unwritable(job.folder):
        return f"refused: {why}"
    if (about := lock.holder(job.folder)) is not None:
        return f"running, {lock.describe(about)}"
    if queued := launcher.queued(job):
        return f"queued, {queued}"
    try:
        to_do = compare_with_former(job)
        check_values(_config_of(job))
    except ValueError as error:
        return f"refused: {str(error).splitlines()[0]}"
    if not (job.folder / "config.yaml").is_file():
        return "new"
    if not job.config.get("resume", True):
        return "starts anew: removes what an earlier run left there"
    if not to_do and (job.folder / "done.json").is_file():
        return "finished"
    return _describe_checkpoint(job.folder / "checkpoints")


def _config_of(job: Job) -> DictConfig:
    config = OmegaConf.create(job.plain(job.task))
    assert isinstance(config, DictConfig)
    return config


def _describe_checkpoint(folder: Path) -> str:
    from lightning_modules.checkpoint.weights import read_facts  # imports torch
    from lightning_modules.checkpoint.whole import newest_whole

    try:
        checkpoint = newest_whole(folder)
    except (ValueError, OSError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    if checkpoint is None:
        return "starts at step 0: no checkpoint there"
    return f"goes on from step {read_facts(checkpoint)['global_step']}"


def show(jobs: Sequence[Job], states: Sequence[str], manner: str) -> str:
    """Returns one line for each job, and one with the number of jobs that would run."""
    names = [job.name for job in jobs]
    width, wide = max(map(len, names)), max(min(len(state), 40) for state in states)
    lines = [
        f"{name:<{width}}  {state:<{wide}}  {_near(job.folder)}".lstrip()
        for job, name, state in zip(jobs, names, states, strict=True)
    ]
    count = sum(map(_runs, states))
    lines.append(f"{count} of {len(jobs)} would run{manner and f', {manner}'}; nothing was written")
    return "\n".join(lines)


def _runs(state: str) -> bool:
    return state.partition(" ")[0].rstrip(":,") in ("new", "starts", "goes")


def _near(folder: Path) -> str:
    """Returns the absolute or the relative path, whichever is shorter."""
    return min(str(folder), os.path.relpath(folder), key=len)
