"""When checkpoints are saved, and when a run stops."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.batch import data_rank
from lightning_modules.checkpoint.position import (
    close_epoch,
    leave_epoch_open,
    mark_validation_due,
    rescale,
    validation_is_next,
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

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, which the same command resumes from, and the one before it.

    It is written every `every_n_steps` optimizer steps, at the end of an epoch and of training,
    and when the run is told to stop: by Ctrl-C, by SIGTERM, SIGUSR1 or SIGUSR2, and
    `walltime_margin_s` before its time is over. Signals are only noted; after each step all ranks
    agree whether one of them was told, save, and leave with `Preempted`.

    Args:
        walltime: how long the run may take, as `24:00:00` or in seconds; without it SLURM is asked.

    Raises:
        ValueError: a number that makes no sense.
        OSError: on all ranks, where there is no room; what was saved before stays.
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
        self._step = 0  # the last one that was seen to end
        self._stopping: str | None = None  # as all ranks know
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
            remove(self.folder / LAST)  # damaged, and must not become the one before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With accumulated gradients most batches end no step; the end of an epoch is saved as such.
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
        # Not when it is agreed: the metrics of a step are logged behind its end.
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
        launcher = trainer.strategy.launcher
        alone = isinstance(exception, Preempted) and not self._stopping
        if alone and isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(9)  # ranks that would wait for this one

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
            signals.received = self._stopping  # what comes now is told too late

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
    """Keeps the weights of the best validation in `best.ckpt`, for evaluation and not to resume.

    Not Lightning's ModelCheckpoint, which warns of the folder that a resumed run finds full and of
    a run that was moved, and writes over shards in place.

    Args:
        monitor: a metric that validation logs.
        mode: `min` or `max`.
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
        return self._generate_state_key(monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.monitor)
        # The word of one rank: a metric that is not synchronised differs between them.
        value = trainer.strategy.broadcast(None if value is None else float(value))
        if value is None:
            raise ValueError(
                f"callbacks.best.monitor={self.monitor} is not logged by validation, which logs "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        # NaN is no better than anything.
        if value == value and (self.best is None or self._sign * (value - self.best) > 0):
            self.best = value
            save_whole(trainer, self.path, weights_only=True)
