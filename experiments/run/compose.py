"""Builds the objects of a composed config, for all programs."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import rich
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from rich.syntax import Syntax

from datamodules.base import VideoDataModule
from datamodules.batch import data_rank
from datamodules.errors import BadSampleError
from experiments.run import process
from experiments.run.made import remove_unused
from lightning_modules.callbacks.memory import is_out_of_memory
from lightning_modules.checkpoint.preemption import Preempted, signals
from lightning_modules.loggers.wandb import finish_wandb

logger = logging.getLogger(__name__)

_USER_ERRORS = (ValueError, OSError, BadSampleError, OmegaConfBaseException)


def axes(config: DictConfig) -> dict[str, Any]:
    """Returns the option of each config group and the seed, which group the runs of an ablation."""
    choices = HydraConfig.get().runtime.choices
    named = {group: str(option) for group, option in choices.items() if "hydra" not in group}
    return {**named, "seed": config.seed}


def plain(node: Any) -> Any:
    """Returns a config node as plain containers with all interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)


def build(node: Any, what: str, **arguments: Any) -> Any:
    """Calls Hydra's `instantiate` and turns its errors into one line that names `what`.

    Raises:
        ValueError: the object cannot be built.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise ValueError(f"{what}: {str(reason).splitlines()[0]}") from error


def build_all(group: Any, what: str) -> list[Any]:
    """Builds the objects of a group such as `callbacks`. Nodes that are null are left out."""
    return [build(node, f"{what}.{name}") for name, node in (group or {}).items() if node]


def share_steps(trainer: Trainer, datamodule: VideoDataModule) -> None:
    """Sets gradient accumulation so that one optimizer step takes `data.global_batch_size` samples.

    Also converts a whole `trainer.val_check_interval` from optimizer steps to micro-batches of one
    rank, because Lightning counts those.

    Raises:
        ValueError: micro-batches and ranks do not divide the global batch size, or a setting of the
            trainer contradicts it.
    """
    ranks = data_rank(trainer)[1]
    try:
        micro_batches = datamodule.accumulation(ranks)
    except ValueError as error:
        if (readers := trainer.world_size // ranks) == 1:
            raise
        raise ValueError(
            f"{error} (ranks of {readers} processes each, trainer.strategy.tensor_parallel_size)"
        ) from None
    if trainer.accumulate_grad_batches not in (1, micro_batches):
        raise ValueError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, but "
            f"data.global_batch_size={datamodule.global_batch_size} decides, and makes it "
            f"{micro_batches} here: leave it out"
        )
    if trainer.overfit_batches:  # pyright: ignore[reportAttributeAccessIssue]
        micro_batches = trainer.accumulate_grad_batches
    trainer.accumulate_grad_batches = micro_batches
    limit, interval = trainer.limit_train_batches, getattr(trainer, "val_check_interval", None)
    if isinstance(limit, int) and limit % micro_batches and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
        fewer = limit // micro_batches * micro_batches
        raise ValueError(
            f"trainer.limit_train_batches={limit} ends in the middle of an optimizer step, which "
            f"has {micro_batches} micro-batches on each of {ranks} ranks: set it to "
            f"{f'{fewer} or ' if fewer else ''}{fewer + micro_batches}, or to a share such as 0.1, "
            "or set trainer.max_steps"
        )
    if isinstance(interval, int):
        trainer.val_check_interval = interval * micro_batches


def print_config(config: DictConfig) -> None:
    if config.print_config and not rank_zero_only.rank:
        text = OmegaConf.to_yaml(config, resolve=True)
        rich.print(Syntax(text, "yaml", background_color="default", word_wrap=True))


def user_errors_in_one_line(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorates `main`: errors that the user can fix end the program with one line, no traceback.

    In a multirun the other jobs continue, and the program fails at the end. The W&B run of a job
    always ends with the job, so that the next job does not log into it.

    Exit codes: 1 for an error, 130 after Ctrl-C, and 75 after a signal of the scheduler, which has
    then been asked to requeue the job.
    """

    @wraps(main)
    def guarded(config: DictConfig) -> Any:
        # Lightning uses a class that PyTorch is renaming.
        warnings.filterwarnings("ignore", r".*LeafSpec.*", category=FutureWarning)
        # This comes on a login node, or in a job of a multirun that is started without srun.
        warnings.filterwarnings("ignore", r"The `srun` command is available")
        # A run without validation data is intended.
        warnings.filterwarnings("ignore", r"Total length of `list` across ranks is zero")
        failed, kept = 1, True
        try:
            with signals.listen():
                score = main(config)
            failed = 0
            return score
        except Preempted as stop:
            _leave(stop.reason)
        except KeyboardInterrupt:
            sys.exit(process.exit_code(130, rank_zero_only.rank))
        except Exception as error:
            if signals.received not in (None, "SIGINT"):
                # A scheduler signals all processes of a job. The W&B process may exit first.
                logger.warning("after %s: %r", signals.received, error)
                _leave(signals.received)
            kept = False
            if not isinstance(error, _USER_ERRORS) and not is_out_of_memory(error):
                raise
            logger.debug("where it came from", exc_info=True)
            notes = getattr(error, "__notes__", []) if is_out_of_memory(error) else []
            line = f"error: {[*notes, str(error).strip()][0].splitlines()[0]}"
            if isinstance(error, MissingMandatoryValue):
                line += "; set it, or choose the option that does (ropelab-train --help)"
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                logger.error(line)
                raise CompactHydraException(line) from None
            process.fail(line, rank_zero_only.rank)
        finally:
            if wandb.run is not None:
                _finish_wandb(failed)
            if not kept and not rank_zero_only.rank:
                folder = Path(HydraConfig.get().runtime.output_dir)
                remove_unused(folder, HydraConfig.get().job.config_name == "evaluate")

    return guarded


def _leave(reason: str) -> NoReturn:
    _finish_wandb(os.EX_TEMPFAIL, preempted=True)  # before the requeue, which kills the job
    sys.exit(process.leave(reason, rank_zero_only.rank))


def _finish_wandb(exit_code: int, preempted: bool = False) -> None:
    try:
        finish_wandb(exit_code, preempted)
    except (OSError, wandb.Error) as error:
        if signals.received is None:
            raise
        logger.warning("the W&B process has already exited: %r", error)
