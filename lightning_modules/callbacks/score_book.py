"""Stores scores with everything they depend on, and the answers that they are made of."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import distributed

from datamodules.base import datamodule_of
from datamodules.batch import PreferenceBatch, VideoBatch
from datamodules.common.atomic import write_whole
from lightning_modules.callbacks.samples import FirstBatch, without_folder
from lightning_modules.metrics.answers import FULL
from lightning_modules.metrics.answers.generate import GREEDY
from lightning_modules.metrics.answers.lines import answer_lines, as_text, with_values

_PACKAGES = ("ropelab", "torch", "transformers", "torchmetrics")
_COLUMNS = ["step", "condition", "name", "value", "count", "parser", "max_new_tokens"]


class ScoreBook(FirstBatch):
    """Stores the scores of each validation in `scores.json`, and in W&B as a table.

    A validation is `{"run", "step", "condition", "weights", "scores": [{"name", "value", "count",
    "parser", "max_new_tokens", "higher_is_better"}], "generation", "prompt", "versions", ...}`. The
    other fields come from the datamodule's `describe`. The answers of a validation are lines of
    `answers/step-STEP.jsonl`, as `answer_lines` describes them; those of another condition than
    `full` are in `answers/step-STEP-CONDITION.jsonl`. A resumed run replaces the steps that it
    repeats.

    Args:
        folder: folder for `scores.json` and `answers`.
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
        self.path, self.answers = Path(folder) / "scores.json", Path(folder) / "answers"
        self.run, self.weights, self.step = run, weights, step
        self._prompt = ""
        self._lines: list[dict[str, Any]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines = []

    def on_first_batch(
        self, trainer: Trainer, pl_module: Any, batch: VideoBatch | PreferenceBatch
    ) -> None:
        if getattr(pl_module, "scores", None) and trainer.is_global_zero:
            tokenizer = datamodule_of(trainer).tokenizer
            asked = pl_module.see(batch.first(1)).questions()
            self._prompt = as_text(asked.input_ids[0][asked.attention_mask[0]].tolist(), tokenizer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: VideoBatch | PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        super().on_validation_batch_end(
            trainer, pl_module, outputs, batch, batch_idx, dataloader_idx
        )
        if outputs and isinstance(batch, VideoBatch) and not trainer.sanity_checking:
            tokenizer = datamodule_of(trainer).tokenizer
            seen = pl_module.see(batch)
            self._lines += answer_lines(seen, outputs, pl_module.score_by_name, tokenizer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        scored = getattr(pl_module, "scored", None)
        if not scored or trainer.sanity_checking:
            return
        lines = _of_all_ranks(trainer, self._lines)
        if not trainer.is_global_zero:
            return
        step = trainer.global_step if self.step is None else self.step
        rows = [{"name": name, **facts} for name, facts in scored.items()]
        validation = {
            "run": self.run,
            "step": step,
            "condition": pl_module.condition,
            "weights": self.weights,
            "scores": rows,
            "generation": GREEDY,
            "prompt": self._prompt,
            **datamodule_of(trainer).describe(),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        self.write_answers(step, pl_module.condition, with_values(lines, pl_module.score_by_name))
        self.write(validation)
        table = [[validation.get(c, row.get(c)) for c in _COLUMNS] for row in rows]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("val/scores", columns=_COLUMNS, data=table, step=step)

    def write(self, validation: dict[str, Any]) -> None:
        """Appends a validation after those of earlier steps; drops those of later steps."""
        earlier = json.loads(self.path.read_text()) if self.path.is_file() else []
        step, condition = validation["step"], validation.get("condition", FULL)
        kept = [former for former in earlier if former["step"] < step]
        if condition != FULL:  # it stands beside the other conditions of its step
            same = [former for former in earlier if former["step"] == step]
            kept += [former for former in same if former.get("condition", FULL) != condition]
        write_whole(self.path, json.dumps([*kept, validation], indent=1, default=str))

    def write_answers(self, step: int, condition: str, lines: Sequence[dict[str, Any]]) -> None:
        """Writes the file of a validation; drops those of later steps."""
        own = self.answers / f"step-{step:08d}{'' if condition == FULL else f'-{condition}'}.jsonl"
        for path in self.answers.glob("step-*.jsonl"):
            if condition == FULL and path.name >= own.name.removesuffix(".jsonl"):
                path.unlink()
        self.answers.mkdir(parents=True, exist_ok=True)
        short = [without_folder(line["key"]) for line in lines]
        if len(set(short)) == len(short):
            lines = [{**line, "key": key} for line, key in zip(lines, short, strict=True)]
        head = {"step": step, "condition": condition}
        text = (json.dumps({**head, **line}, ensure_ascii=False) + "\n" for line in lines)
        write_whole(own, "".join(text))


def _of_all_ranks(trainer: Trainer, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines of all ranks on rank 0, and nothing on the others."""
    if trainer.world_size == 1:
        return lines
    ranks: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    distributed.gather_object(lines, ranks)
    return [line for rank in ranks or [] for line in rank]
