"""Callbacks that decide when checkpoints are saved and when a run stops."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.batch import data_rank
from lightning_modules.checkpoint.position import (
    close_epoch,
    leave_epoch_open,
    mark_validation_due,
    rescale,
)
from lightning_modules.checkpoint.preemption import (
    Preempted,
    agree,
    leave_signals_to_us,
    signals,
    stops_at,
)
from lightning_modules.checkpoint.whole import LAST, PREVIOUS, remove
from lightning_modules.checkpoint.write import DiskCheckpointIO, save_whole
from lightning_modules.private.lightning import kill_other_ranks, validation_is_next

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, from which the same command resumes, and keeps the one before it.

    It saves every `every_n_steps` optimizer steps, at the end of an epoch and of training, and when
    the run must stop: on Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2, and `walltime_margin_s` seconds
    before its time limit. A signal only sets a flag. After each step, all ranks agree whether one
    of them got a signal; if so, they save and exit with `Preempted`.

    Args:
        dirpath: folder for the checkpoints.
        every_n_steps: optimizer steps between two checkpoints.
        walltime_margin_s: seconds before the time limit at which the run stops.
        walltime: time limit of the run, as `24:00:00` or in seconds; None: SLURM's limit.

    Raises:
        ValueError: a number is out of range.
        OSError: a checkpoint cannot be written, for example because the disk is full; raised on
            all ranks, and earlier checkpoints stay.
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_steps: int = 100,
        walltime_margin_s: float | int = 120,
        walltime: str | float | int | None = None,
    ):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be 1 or more")
        if walltime_margin_s < 0:
            raise ValueError(f"walltime_margin_s={walltime_margin_s} must be 0 or more")
        self.folder = Path(dirpath)
        self.every_n_steps = every_n_steps
        self._stops_at = stops_at(walltime, walltime_margin_s)
        self._step = 0  # the last finished step
        self._stopping: str | None = None  # the reason to stop that all ranks agreed on
        self._deferral = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        leave_signals_to_us(trainer)
        trainer.strategy.checkpoint_io = DiskCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        close_epoch(trainer)
        self._step, self._stopping = trainer.global_step, None
        self._deferral.enter_context(signals.deferred())
        resumed = trainer.ckpt_path and Path(trainer.ckpt_path).resolve()
        if trainer.is_global_zero and resumed == (self.folder / PREVIOUS).resolve():
            remove(self.folder / LAST)  # it is damaged, and must not become the previous one

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradient accumulation, most batches end no step. `on_train_epoch_end` saves the end
        # of an epoch.
        ends_epoch = trainer.is_last_batch and not validation_is_next(trainer)
        if trainer.global_step == self._step or ends_epoch:
            return
        self._step = trainer.global_step
        self._agree(trainer)
        if self._stopping or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Stop here, not right after the agreement: a step's metrics are logged after its end.
        self._stop_if_agreed(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_agreed(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_agreed(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._agree(trainer)
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._deferral.close()
        self._agree(trainer)
        self._stop_if_agreed(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._deferral.close()
        if isinstance(exception, Preempted) and not self._stopping:
            kill_other_ranks(trainer)  # they would wait for this one

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["world_size"] = data_rank(trainer)[1]
        mark_validation_due(trainer, checkpoint)
        leave_epoch_open(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            rescale(checkpoint, data_rank(trainer)[1])

    def _agree(self, trainer: Trainer) -> None:
        reason = signals.received
        if reason is None and self._stops_at is not None and time.time() > self._stops_at:
            reason = "walltime"
        self._stopping = agree(trainer, reason)
        if self._stopping:
            signals.received = self._stopping  # later signals have no effect

    def _stop_if_agreed(self, trainer: Trainer) -> None:
        if not self._stopping:
            return
        if trainer.is_global_zero:
            step = trainer.global_step
            logger.warning(
                "stopped after step %d (%s): the same command goes on from there",
                step,
                self._stopping,
            )
        raise Preempted(self._stopping)

    def _save(self, trainer: Trainer) -> None:
        save_whole(trainer, self.folder / LAST, self.folder / PREVIOUS)


class BestCheckpoint(Checkpoint):
    """Saves the weights of the best validation in `best.ckpt`, for evaluation, not for resuming.

    It replaces Lightning's ModelCheckpoint, which warns if a resumed run finds a non-empty folder
    or if a run was moved, and which overwrites shards in place.

    Args:
        dirpath: folder for the checkpoint.
        monitor: name of a metric that validation logs.
        mode: `min` or `max`.
        filename: name of the checkpoint.
    """

    def __init__(
        self,
        dirpath: str | Path,
        monitor: str = "val/loss",
        mode: str = "min",
        filename: str = "best.ckpt",
    ):
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode} must be min or max")
        self.path = Path(dirpath) / filename
        self.monitor, self._sign = monitor, 1 if mode == "max" else -1
        self.best: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = DiskCheckpointIO()

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{dict(monitor=self.monitor)}"  # as Lightning makes them

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        # Use the value of one rank: an unsynchronised metric differs between ranks.
        value = trainer.strategy.broadcast(None if value is None else float(value))
        if value is None:
            raise ValueError(
                f"callbacks.best.monitor={self.monitor} is not logged by validation, which logs "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        # NaN is never better.
        if value == value and (self.best is None or self._sign * (value - self.best) > 0):
            self.best = value
            save_whole(trainer, self.path, weights_only=True)
