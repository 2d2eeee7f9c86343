"""How fast a training is: tokens per second, the share of the hardware used, the wait for data."""

import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.batch import data_rank
from lightning_modules.callbacks.flops import FlopMeter


class Throughput(Callback):
    """Means over all ranks and over the time between two logged steps, in bar and loggers.

    - `train/tokens_per_s`: tokens that the LLM learns from, padding left out.
    - `train/mfu`: FLOPs of the model (`flops.py`) over what the devices could do in that time.
    - `train/data_wait`: share of the time from the end of a batch to the start of the next.

    Time for validation and checkpoints counts nowhere.

    Args:
        peak_flops: of one device, per second; None: by its name. A CPU has none, and so no MFU.
        known: FLOP/s of devices by the name that CUDA gives them.
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
        self._meter.reset()  # of what validation ran
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
        tokens, flops, waited, seconds = cast(Tensor, sums).tolist()  # of all ranks
        ranks = data_rank(trainer)[1]
        flops *= ranks / trainer.world_size  # each counts the layers that it shares as its own
        pl_module.log("train/tokens_per_s", tokens / seconds * ranks, prog_bar=True)
        pl_module.log("train/data_wait", waited / seconds, prog_bar=True)
        if self._peak:
            pl_module.log("train/mfu", flops / seconds / self._peak, prog_bar=True)

    def _clear(self) -> None:
        self._tokens: Tensor | int = 0
        self._flops = 0
        self._waited = self._worked = 0.0
