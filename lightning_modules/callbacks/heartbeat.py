"""The last sign of life of a run, for whoever looks at its directory."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


class Heartbeat(Callback):
    """Writes `status.json` in `folder`, at most every `every_s` seconds and at every end.

    `state` is `training`, `validating`, `testing`, `trained`, `tested`, `stopped` or `failed`, and
    the last two have a `reason`; `step` of `total_steps` optimizer steps (null where training is
    endless), `time` of writing in seconds since 1970, `starts` of the run, `wall_s` of all of
    them, `metrics` as last logged. A process that was killed leaves the state that it was in.
    Rank 0 alone writes, and without a disk it only warns.
    """

    def __init__(self, folder: str | Path, every_s: float = 10.0):
        if every_s < 0:
            raise ValueError(f"every_s={every_s} must be 0 or more seconds")
        self.path, self.every_s = Path(folder) / "status.json", every_s
        self._written, self._starts = -math.inf, 0
        self._began, self._wall_before = time.monotonic(), 0.0
        self._total: int | None = None
        self._step = 0  # where an earlier start came to, until this one trains

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
        if not self._starts:  # before training began: what earlier starts came to stays
            before = read_status(self.path)
            self._starts, self._wall_before = before.get("starts", 0), before.get("wall_s", 0.0)
            self._total, self._step = before.get("total_steps"), before.get("step", 0)
        failed = isinstance(exception, Exception)
        lines = str(exception).strip().splitlines()
        reason = ": ".join([type(exception).__name__, *lines[:1]])
        self._beat(trainer, "failed" if failed else "stopped", now=True, reason=reason)

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
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(status))
            partial.replace(self.path)
        except OSError as error:
            logger.warning("no sign of life in %s: %s", self.path, error)

    def _due(self) -> bool:
        return time.monotonic() - self._written >= self.every_s


def read_status(path: Path) -> dict[str, Any]:
    """Empty where there is none yet, or one that the disk lost."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
