"""Dropout that does not depend on who computes it, or when."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from datamodules.batch import data_rank


class SeedByPosition(Callback):
    """Seeds torch for each training micro-batch from the run's seed, the epoch and its number.

    The number counts the micro-batches of all ranks, so random numbers are the same for any
    number of ranks and after any interruption, and no checkpoint holds a generator's state. Fresh
    weights too depend on the seed alone. Whatever draws outside of training (loaders, validation)
    finds the generators as it left them.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._forked = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(self.seed)  # weights are made after this

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
