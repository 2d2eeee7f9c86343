"""Heartbeat: writes `status.json` while a run trains."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from datamodules.common.atomic import write_whole
from lightning_modules.checkpoint.preemption import Preempted, signals, way_to_end

logger = logging.getLogger(__name__)


class Heartbeat(Callback):
    """Writes `status.json` in `folder`, at most every `every_s` seconds, and whenever a run ends.

    Its fields:

    - `state`: `training`, `validating`, `testing`, `trained`, `tested`; or how the run ended before
      its end, with a `reason`: `stopped` (Ctrl-C), `cancelled`, `preempted` or `failed`.
    - `step`, `total_steps`: optimizer steps; `total_steps` is null for endless training.
    - `time`: time of writing, in seconds since 1970.
    - `starts`: how often the run was started.
    - `wall_s`: seconds of all starts together.
    - `metrics`: last logged values.

    A killed process leaves its last state. Only rank 0 writes; if writing fails, it only warns.
    """

    def __init__(self, folder: str | Path, every_s: float = 10.0):
        if every_s < 0:
            raise ValueError(f"every_s={every_s} must be 0 or more seconds")
        self.path, self.every_s = Path(folder) / "status.json", every_s
        self._written, self._starts = -math.inf, 0
        self._began, self._wall_before = time.monotonic(), 0.0
        self._total: int | None = None
        self._step = 0  # last step of earlier starts, until this start trains

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) else None
        before = read_status(self.path)
        self._starts = int(before.get("starts", 0)) + 1
        self._wall_before = float(before.get("wall_s", 0.0))
        self._beat(trainer, "training", now=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._beat(trainer, "training")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._beat(trainer, "validating")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat(trainer, "trained", now=True)

    def on_test_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._beat(trainer, "testing")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat(trainer, "tested", now=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not self._starts:  # failed before training began: keep the values of earlier starts
            before = read_status(self.path)
            self._starts, self._wall_before = before.get("starts", 0), before.get("wall_s", 0.0)
            self._total, self._step = before.get("total_steps"), before.get("step", 0)
        if trainer.is_global_zero:
            state, reason = _how_it_ended(exception)
            self._beat(trainer, state, now=True, reason=reason)

    def _beat(self, trainer: Trainer, state: str, *, now: bool = False, **more: Any) -> None:
        if not trainer.is_global_zero or not (now or self._due()):
            return
        self._written = time.monotonic()
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
        status = {
            "state": state,
            "step": max(trainer.global_step, self._step),
            "total_steps": self._total,
            "time": time.time(),
            "starts": self._starts,
            "wall_s": round(self._wall_before + self._written - self._began, 1),
            "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)},
            **more,
        }
        try:
            write_whole(self.path, json.dumps(status))
        except OSError as error:
            logger.warning("cannot write the heartbeat to %s: %s", self.path, error)

    def _due(self) -> bool:
        return time.monotonic() - self._written >= self.every_s


def _how_it_ended(exception: BaseException) -> tuple[str, str]:
    """Returns the state of a run that an exception ended, and the reason."""
    # A signal may break something first, such as a connection: then the signal is the reason.
    signal = exception.reason if isinstance(exception, Preempted) else signals.received
    if isinstance(exception, KeyboardInterrupt) or signal == "SIGINT":
        return "stopped", "Ctrl-C"
    if signal is not None:
        return way_to_end(signal), signal
    lines = str(exception).strip().splitlines()
    reason = ": ".join([type(exception).__name__, *lines[:1]])
    return "failed" if isinstance(exception, Exception) else "stopped", reason


def read_status(path: Path) -> dict[str, Any]:
    """Returns the status; empty if the file does not exist or cannot be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
