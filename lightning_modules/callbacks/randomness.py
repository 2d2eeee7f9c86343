"""Seeds dropout so that it does not depend on ranks or interruptions."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from datamodules.batch import data_rank


class SeedByPosition(Callback):
    """Seeds torch for each training micro-batch from the run's seed, the epoch and its number.

    The number counts the micro-batches of all ranks. So random numbers are the same for any number
    of ranks and after any interruption, and no checkpoint stores a generator's state. Initial
    weights also depend only on the seed. Code outside of training (loaders, validation) is not
    affected: the generators' states are restored after each micro-batch.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._forked = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(self.seed)  # weights are initialised after this

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._forked.close()
        device = pl_module.device
        devices = [] if device.type == "cpu" else [device]
        self._forked.enter_context(torch.random.fork_rng(devices, device_type=device.type))
        rank, ranks = data_rank(trainer)
        number = batch_idx * ranks + rank
        place = np.random.SeedSequence([self.seed, trainer.current_epoch, number])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forked.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._forked.close()
