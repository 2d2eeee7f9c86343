"""Stores scores with everything they depend on, which shows whether two are comparable."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from datamodules.base import datamodule_of
from datamodules.batch import VISUAL_SLOT, PreferenceBatch, VideoBatch
from datamodules.common.atomic import write_whole
from lightning_modules.callbacks.samples import FirstBatch
from lightning_modules.metrics.answers.generate import GREEDY

_PACKAGES = ("ropelab", "torch", "transformers", "torchmetrics")
_COLUMNS = ["step", "name", "value", "count", "parser", "max_new_tokens"]


class ScoreBook(FirstBatch):
    """Stores the scores of each validation in `scores.json`, and in W&B as a table.

    A validation is `{"run", "step", "weights", "scores": [{"name", "value", "count", "parser",
    "max_new_tokens"}], "generation", "prompt", "versions", ...}`. The other fields come from the
    datamodule's `describe`. A resumed run replaces the steps that it repeats.

    Args:
        folder: folder for `scores.json`.
        run: name of the run that trained the model.
        weights: file and digest of the scored weights, if run and step do not identify them.
        step: training step of the model; None: the trainer's.
    """

    def __init__(
        self,
        folder: str | Path,
        run: str,
        weights: dict[str, str] | None = None,
        step: int | None = None,
    ):
        self.path = Path(folder) / "scores.json"
        self.run, self.weights, self.step = run, weights, step
        self._prompt = ""

    def on_first_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: VideoBatch | PreferenceBatch
    ) -> None:
        if getattr(pl_module, "scores", None) and trainer.is_global_zero:
            tokenizer = datamodule_of(trainer).tokenizer
            asked = batch.first(1).questions()
            self._prompt = _as_text(asked.input_ids[0][asked.attention_mask[0]].tolist(), tokenizer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scored = getattr(pl_module, "scored", None)
        if not scored or trainer.sanity_checking or not trainer.is_global_zero:
            return
        step = trainer.global_step if self.step is None else self.step
        rows = [{"name": name, **facts} for name, facts in scored.items()]
        validation = {
            "run": self.run,
            "step": step,
            "weights": self.weights,
            "scores": rows,
            "generation": GREEDY,
            "prompt": self._prompt,
            **datamodule_of(trainer).describe(),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        self.write(validation)
        table = [[step, *(row[column] for column in _COLUMNS[1:])] for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("val/scores", columns=_COLUMNS, data=table, step=step)

    def write(self, validation: dict[str, Any]) -> None:
        """Appends a validation after those of earlier steps; drops those of later steps."""
        earlier = json.loads(self.path.read_text()) if self.path.is_file() else []
        kept = [former for former in earlier if former["step"] < validation["step"]]
        write_whole(self.path, json.dumps([*kept, validation], indent=1, default=str))


def _as_text(ids: list[int], tokenizer: Any) -> str:
    """Decodes a prompt as the LLM reads it, with `<visual>` in place of visuals."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == VISUAL_SLOT:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "<visual>".join(tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces)
