"""Shows how far a run is: a bar on a terminal, lines in a file."""

import time
from collections.abc import Mapping
from typing import Any

import rich
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn


def bar_or_lines(every_s: float = 30.0, leave: bool = True) -> ProgressBar:
    """Returns Lightning's bar if the output is a terminal, else `ProgressLines`.

    Args:
        every_s: seconds between two lines.
        leave: whether the bar of an epoch stays.

    Raises:
        ValueError: `every_s` is negative.
    """
    if every_s < 0:
        raise ValueError(f"every_s={every_s} must be 0 or more seconds")
    console = rich.get_console()
    if console.is_terminal or console.is_jupyter:
        return RichProgressBar(leave=leave)
    return ProgressLines(every_s)


class ProgressLines(ProgressBar):
    """Prints a line at most every `every_s` seconds, and one for each validation, on rank 0.

    A bar that is drawn again and again is of no use in a file.
    """

    def __init__(self, every_s: float = 30.0):
        super().__init__()
        self.every_s = every_s
        self._enabled = True
        self._printed = 0.0
        self._step = 0
        self._began: tuple[int, float] | None = None  # step and time after the first step

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._began = trainer.global_step, None
        self._printed = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still accumulated
        self._step, now = trainer.global_step, time.monotonic()
        total = trainer.estimated_stepping_batches
        if self._began is None:
            self._began = self._step, now  # the first step is slower than the others
        if self._due() or self._step == total:
            steps, seconds = self._step - self._began[0], now - self._began[1]
            speed = steps / seconds if steps and seconds else None
            self._say(_train_line(self._step, total, trainer.callback_metrics, speed))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("validation", trainer.num_val_batches, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith("val/")}
        if found and not trainer.sanity_checking:
            values = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            # a trainer that only evaluates has taken no step
            step = f"step {trainer.global_step}: " if trainer.state.fn == TrainerFn.FITTING else ""
            self._say(f"{step}validation, {values}")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count("test", trainer.num_test_batches, batch_idx)

    def _count(self, what: str, totals: Any, batch_idx: int) -> None:
        if self._due():
            total = sum(totals) if isinstance(totals, list) else totals
            self._say(f"{what}: batch {batch_idx + 1} of {total}")

    def _due(self) -> bool:
        return time.monotonic() - self._printed >= self.every_s

    def _say(self, line: str) -> None:
        self._printed = time.monotonic()
        if self._enabled and self.trainer.is_global_zero:
            print(line, flush=True)


def _train_line(
    step: int, total: int | float, metrics: Mapping[str, Any], speed: float | None
) -> str:
    """Returns the line of an optimizer step: step, loss, speed and expected end."""
    endless = total == float("inf")
    words = [f"step {step}" if endless else f"step {step} of {total:.0f}"]
    if (loss := metrics.get("train/loss")) is not None:
        words.append(f"loss {float(loss):.4g}")
    if speed is not None:
        words.append(f"{speed:.3g} steps/s")
        if not endless and step < total:
            end = time.localtime(time.time() + (total - step) / speed)
            words.append(f"ends about {time.strftime('%a %H:%M:%S', end)}")
    return ", ".join(words)
