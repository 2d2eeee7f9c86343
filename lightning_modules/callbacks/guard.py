"""Skips optimizer steps that would corrupt the weights."""

import logging
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.checkpoint.weights import finite_everywhere

logger = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Skips optimizer steps whose loss or gradients contain NaN or Inf, on all ranks together.

    Weights and moments do not change; the learning-rate schedule advances. Skipped steps are
    counted over the whole run, including resumes, and logged as `train/skipped_steps`.

    Raises:
        ValueError: more than `max_skipped` steps were skipped.
    """

    def __init__(self, max_skipped: int = 10):
        if max_skipped < 0:
            raise ValueError(f"max_skipped={max_skipped} must be 0 or more")
        self.max_skipped = max_skipped
        self.skipped = 0
        self._losses: list[Tensor] = []  # losses of this step's micro-batches

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        finite = finite_everywhere([*self._losses, *gradients])
        self._losses = []
        if not finite:
            optimizer.zero_grad(set_to_none=True)  # no gradients, so no update
            self._count(trainer)
        pl_module.log("train/skipped_steps", float(self.skipped))

    def _count(self, trainer: Trainer) -> None:
        self.skipped += 1
        step = trainer.global_step + 1
        if self.skipped > self.max_skipped:
            raise ValueError(
                f"step {step}: loss or gradients were NaN or Inf {self.skipped} times, but "
                f"callbacks.finite.max_skipped is {self.max_skipped}: lower optim.optimizer.lr, or "
                "look at the samples of these steps (data.audit=true lists them)"
            )
        if trainer.is_global_zero:
            logger.warning("step %d is skipped: its loss or gradients are NaN or Inf", step)
