"""Lists what a command of ropelab-train would run, and writes nothing: `--dry-run`."""

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

from experiments.launcher.base import ProcessLauncher, refusal, unwritable
from experiments.launcher.job import Job
from experiments.launcher.wandb_key import check_key
from experiments.run import lock

_WORDS = {"--dry-run": True, "dry_run=true": True, "dry_run=false": False}


def take_dry_run(command: list[str]) -> bool:
    """Takes `--dry-run` or `dry_run=true` out of a command line; returns whether it was there.

    Where it was, the command asks for this module's sweeper instead. It is no key of the config,
    since a run must not differ from the one that was listed.

    Args:
        command: `sys.argv`, which is changed.
    """
    said = [word for word in command if word.lower().lstrip("+") in _WORDS]
    command[:] = [word for word in command if word not in said]
    if not said or not _WORDS[said[-1].lower().lstrip("+")]:
        return False
    added = [f"hydra.sweeper._target_=hydra_plugins.ropelab.{ListingSweeper.__name__}"]
    if not {"-m", "--multirun"} & set(command):
        command.insert(1, "-m")
        added.append("+hydra.sweeper.single=true")
    # Beside the other overrides: Hydra reads them in one piece, before or behind its options.
    overrides = [n for n, word in enumerate(command) if "=" in word and not word.startswith("-")]
    place = overrides[-1] + 1 if overrides else len(command)
    command[place:place] = added
    return True


class ListingSweeper(Sweeper):
    """Finds the jobs as Hydra's own sweeper does, and prints them instead of launching them.

    Args:
        params: what is swept by the config, as Hydra's own sweeper has it.
        single: the command is no multirun; it runs in `hydra.run.dir`.
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
        # Hydra loads this module again while it looks for plugins: no class may be built on it.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        if not isinstance(self.launcher, ProcessLauncher):
            sys.exit("error: a dry run needs a launcher of ropelab: leave hydra/launcher out")
        parser = OverridesParser.create(config_loader=self.loader)
        swept = [f"{key}={values}" for key, values in self.params.items()]
        overrides = parser.parse_overrides([*swept, *arguments])
        (words,) = BasicSweeper.split_arguments(overrides, None)
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
    """Says what would become of a job.

    `finished`, `running …`, `queued …`, `new`, `starts anew …`, `goes on from step N`, or
    `refused: …`. Reads files alone.
    """
    if job.done() is not None:
        return "finished"
    if why := unwritable(job.folder):
        return f"refused: {why}"
    if (about := lock.holder(job.folder)) is not None:
        return f"running, {lock.describe(about)}"
    if queued := launcher.queued(job):
        return f"queued, {queued}"
    if why := refusal(job) or _wrong_value(job):
        return f"refused: {why}"
    if not (job.folder / "config.yaml").is_file():
        return "new"
    if not job.config.get("resume", True):
        return "starts anew: what an earlier run left there is removed"
    return _describe_former(job)


def _wrong_value(job: Job) -> str | None:
    """Returns what the program would say of a value that nothing can be built with."""
    from experiments.command.values import check_values

    try:
        check_values(_config_of(job))
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def _config_of(job: Job) -> DictConfig:
    config = OmegaConf.create(job.plain(job.task))
    assert isinstance(config, DictConfig)
    return config


def _describe_former(job: Job) -> str:
    """Of a job in whose directory something has run; asks the program's own checks."""
    from experiments.directory.run_directory import RunDirectory
    from lightning_modules.checkpoint.weights import read_checkpoint

    try:
        directory = RunDirectory(_config_of(job), hold=False)
        if directory.finished():
            return "finished"
        checkpoint = directory.checkpoint
    except (ValueError, OSError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    if checkpoint is None:
        return "starts at step 0: no checkpoint there"
    return f"goes on from step {read_checkpoint(checkpoint)['global_step']}"


def show(jobs: Sequence[Job], states: Sequence[str], manner: str) -> str:
    """A line for every job, and one that says how many would run."""
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
    """Seen from here, where that is shorter."""
    return min(str(folder), os.path.relpath(folder), key=len)
