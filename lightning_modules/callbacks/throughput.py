"""Measures training speed: tokens per second, MFU, and the time spent waiting for data."""

import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.batch import data_rank
from lightning_modules.callbacks.flops import FlopMeter


class Throughput(Callback):
    """Logs means over all ranks and over the time between two logged steps, to bar and loggers.

    - `train/tokens_per_s`: tokens that the LLM reads with gradients, without padding.
    - `train/mfu`: FLOPs of the model (`flops.py`) over the devices' peak FLOPs in that time.
    - `train/data_wait`: share of time between the end of a batch and the start of the next.

    Time for validation and checkpoints is not included.

    Args:
        peak_flops: FLOP/s of one device; None: looked up by its name. A CPU has none, so no MFU.
        known: FLOP/s of devices, by their CUDA name.
    """

    def __init__(self, peak_flops: float | None = None, known: Mapping[str, float] | None = None):
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops} must be above 0, or null")
        self._peak, self._known = peak_flops, dict(known or {})
        self._meter: FlopMeter | None = None
        self._clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        self._meter = FlopMeter(network)
        self._step, self._ended = trainer.global_step, None
        self._clear()
        device = trainer.strategy.root_device
        if self._peak is None and device.type == "cuda":
            self._peak = self._known.get(torch.cuda.get_device_name(device))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._meter is not None
        self._meter.reset()  # drops the counts of validation
        self._started = time.perf_counter()
        if self._ended is not None:
            self._waited += self._started - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._meter is not None
        self._tokens = self._tokens + self._meter.tokens
        self._flops += self._meter.flops.total()
        self._worked += time.perf_counter() - self._started
        if trainer.global_step != self._step:  # otherwise gradients are still accumulated
            self._step = trainer.global_step
            every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
            if self._step % every == 0:
                self._log(trainer, pl_module)
        self._ended = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._ended = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._meter is not None:
            self._meter.remove()
            self._meter = None

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self._waited + self._worked
        own = [float(self._tokens), float(self._flops), self._waited, seconds]
        self._clear()
        device = trainer.strategy.root_device
        sums = trainer.strategy.reduce(torch.tensor(own, device=device), reduce_op="sum")
        tokens, flops, waited, seconds = cast(Tensor, sums).tolist()  # over all ranks
        ranks = data_rank(trainer)[1]
        flops *= ranks / trainer.world_size  # tensor-parallel ranks each count whole layers
        pl_module.log("train/tokens_per_s", tokens / seconds * ranks, prog_bar=True)
        pl_module.log("train/data_wait", waited / seconds, prog_bar=True)
        if self._peak:
            pl_module.log("train/mfu", flops / seconds / self._peak, prog_bar=True)

    def _clear(self) -> None:
        self._tokens: Tensor | int = 0
        self._flops = 0
        self._waited = self._worked = 0.0
