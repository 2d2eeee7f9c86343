"""A run that is stopped goes on where it was."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, which the same command resumes from.

    It is written every `every_n_steps` optimizer steps, at the end of an epoch and of training,
    and at Ctrl-C: the signal is only noted, and after the step all ranks save and stop together.
    A second Ctrl-C stops at once. The file is whole at any moment: a new one is
    written beside the old one and then takes its name.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int = 100):
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved_step = 0
        self._interrupted = False  # by a signal to this rank
        self._stopping = False  # as all ranks know
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        self._interrupted = self._stopping = False
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._note)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._stopping:  # not before: the metrics of the step are logged behind its end
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With accumulated gradients most batches end no step, and the ends of epochs are saved
        # once they are validated.
        if trainer.global_step == self._saved_step or trainer.is_last_batch:
            return
        self._agree(trainer)
        if self._stopping or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        self._release()
        self._agree(trainer)
        if self._stopping:
            self._stop(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _agree(self, trainer: Trainer) -> None:
        self._stopping = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)

    def _stop(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            step = trainer.global_step
            logger.warning("stopped after step %d: the same command goes on from there", step)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        self._release()

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _save(self, trainer: Trainer) -> None:
        partial = self.path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.path)
        self._saved_step = trainer.global_step
