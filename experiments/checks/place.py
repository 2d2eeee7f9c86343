"""Checks a command's data and checkpoint before it writes, and calls back after its first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from datamodules.base import VideoDataModule
from lightning_modules.checkpoint.weights import read_facts


def check_place(checkpoint: Path | None, trainer: Trainer, datamodule: VideoDataModule) -> None:
    """Reads the list of shards and checks that the checkpoint can continue with them.

    Raises:
        ValueError: the shards or the settings of the stream differ from those of the checkpoint, or
            the checkpoint is beyond the end of this training.
        BadSampleError: the shards do not exist.
    """
    if rank_zero_only.rank:
        return
    datamodule.prepare_data()
    datamodule.fingerprint()  # builds the order of the samples
    if checkpoint is None:
        return
    facts = read_facts(checkpoint)
    if state := facts.get(type(datamodule).__qualname__):
        datamodule.check(state)
    _check_end(checkpoint, facts, trainer)


def _check_end(checkpoint: Path, facts: dict[str, Any], trainer: Trainer) -> None:
    epochs = facts["loops"]["fit_loop"]["epoch_progress"]["current"]["started"]
    for key, reached, end in (
        ("trainer.max_steps", facts["global_step"], trainer.max_steps),
        ("trainer.max_epochs", epochs, trainer.max_epochs),
    ):
        if end is not None and 0 <= end < reached:
            unit = key.rpartition("_")[2].removesuffix("s")
            raise ValueError(
                f"{checkpoint} was trained up to {unit} {reached}, but {key}={end} is below that: "
                "choose another directory with hydra.run.dir=…, or start anew with resume=false"
            )


class AfterFirstStep(Callback):
    """Calls `act` once, after the first optimizer step of this process."""

    def __init__(self, act: Callable[[], None]):
        self._act, self._start = act, 0
        self._waits = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._waits and trainer.global_step > self._start:
            self._waits = False
            self._act()
