"""What is seen of a run while it runs."""

import json
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

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
        tokenizer = trainer.datamodule.conversation.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        network: Any = pl_module.network
        asked = batch.first(self.count).questions()
        ids = network.generate(
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
            self._write([dict(zip(_COLUMNS, row, strict=True)) for row in rows])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("val/generations", columns=_COLUMNS, data=rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Appends to the file; a resumed run replaces the steps that it takes again."""
        path = self.folder / "generations.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        earlier = [line for line in lines if json.loads(line)["step"] < rows[0]["step"]]
        path.write_text("".join(f"{line}\n" for line in [*earlier, *map(json.dumps, rows)]))


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
