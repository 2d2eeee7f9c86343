"""What is seen of a run while it runs."""

import csv
import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from datamodules.batch import VideoBatch

_COLUMNS = ["step", "key", "prompt", "answer", "generated"]


class Generations(Callback):
    """Answers of the model to the first validation batch, beside those that it should give.

    They go to `generations.jsonl` in `folder`, and to W&B as a table. Questions come from the
    datamodule's `conversation`, whose tokenizer reads and writes them.
    """

    def __init__(self, folder: str | Path, count: int = 8, max_new_tokens: int = 16):
        self.folder, self.count, self.max_new_tokens = Path(folder), count, max_new_tokens

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or trainer.sanity_checking:
            return
        tokenizer = trainer.datamodule.conversation.tokenizer
        asked = batch.first(self.count).questions()
        ids = pl_module.network.generate(
            asked,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = [
            tokenizer.batch_decode(rows, skip_special_tokens=True)
            for rows in (asked.input_ids.clamp(min=0), batch.first(self.count).answers(), ids)
        ]
        rows = [
            [trainer.global_step, *(text.strip() for text in row)]
            for row in zip(asked.keys, *texts, strict=True)
        ]
        if trainer.is_global_zero:
            with (self.folder / "generations.jsonl").open("a") as file:
                file.writelines(
                    json.dumps(dict(zip(_COLUMNS, row, strict=True))) + "\n" for row in rows
                )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("val/generations", columns=_COLUMNS, data=rows)


class Throughput(Callback):
    """Tokens that the LLM read per second, over the time between two logged steps."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = trainer.callback_metrics.get("train/tokens")
        now = time.monotonic()
        if tokens is not None and hasattr(self, "_last"):
            rate = tokens.item() * trainer.world_size / (now - self._last)
            pl_module.log("train/tokens_per_s", rate, prog_bar=True)
        self._last = now


class ResumableCSVLogger(CSVLogger):
    """`metrics.csv` in `save_dir` itself; a resumed run goes on in the same file."""

    def __init__(self, save_dir: str | Path):
        super().__init__(save_dir, name="", version="")

    @property
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Keeps the file that is there, where Lightning's writer deletes it."""
        if Path(self.metrics_file_path).is_file():
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])
