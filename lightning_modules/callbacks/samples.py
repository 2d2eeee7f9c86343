"""Callbacks about samples: generated answers, bad samples, and the audit of trained samples."""

import json
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import distributed

from datamodules.base import datamodule_of
from datamodules.batch import PreferenceBatch, VideoBatch, data_rank
from datamodules.common.atomic import write_whole

_COLUMNS = ["step", "key", "prompt", "answer", "generated"]


class FirstBatch(Callback):
    """Calls `on_first_batch` after the first batch of each validation."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch | PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            self.on_first_batch(trainer, pl_module, batch)

    @abstractmethod
    def on_first_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: VideoBatch | PreferenceBatch
    ) -> None: ...


class Generations(FirstBatch):
    """Writes the model's answers to the first validation batch, beside the expected answers.

    They go to `generations.jsonl` in `folder`, and to W&B as a table. The tokenizer is that of the
    datamodule. If the model has no `generate`, nothing is written.
    """

    def __init__(self, folder: str | Path, count: int = 8, max_new_tokens: int = 16):
        for name, value in (("count", count), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.folder, self.count, self.max_new_tokens = Path(folder), count, max_new_tokens

    def on_first_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: VideoBatch | PreferenceBatch
    ) -> None:
        if trainer.sanity_checking or not hasattr(pl_module.network, "generate"):
            return
        tokenizer = datamodule_of(trainer).tokenizer
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
                step = trainer.global_step
                logger.log_table("val/generations", columns=_COLUMNS, data=rows, step=step)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows to the file; a resumed run replaces the steps that it repeats."""
        path = self.folder / "generations.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        earlier = [line for line in lines if json.loads(line)["step"] < rows[0]["step"]]
        write_whole(path, "".join(f"{line}\n" for line in [*earlier, *map(json.dumps, rows)]))


class BadSamples(Callback):
    """Counts bad samples over all ranks, and stops all ranks together if there are too many.

    It runs after each optimizer step, because checkpoints written there include the counts, and
    because the others would wait for a rank that stops alone.

    Raises:
        BadSampleError: the share of bad samples is above `data.stream.max_bad_rate`.
    """

    def __init__(self):
        self._step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still accumulated
        self._step = trainer.global_step
        data = datamodule_of(trainer)
        if (faults := data.faults.get("train")) is None:
            return
        own = torch.tensor(faults.new.total(), device=trainer.strategy.root_device)
        if int(trainer.strategy.reduce(own, reduce_op="sum")):
            everyone: list[Any] = [dict(faults.new)] * trainer.world_size
            if trainer.world_size > 1:
                distributed.all_gather_object(everyone, everyone[0])
            faults.merge(everyone[:: _readers(trainer)])
        pl_module.log("data/bad_samples", float(faults.counts.total()))
        faults.judge(data.trained_samples)


class SampleAudit(Callback):
    """Writes the samples of each optimizer step to `samples.jsonl` in `folder`.

    A line is `{"step": n, "keys": [...]}`; n starts at 1. The keys (shard file, sample) of all
    ranks are in stream order: micro-batch by micro-batch, and rank by rank within each. The file is
    only written if `data.audit` is true. A resumed run replaces the steps that it repeats.
    """

    def __init__(self, folder: str | Path):
        self._path = Path(folder) / "samples.jsonl"
        self._active = False
        self._step = 0
        self._keys: list[list[str]] = []  # keys of this rank's micro-batches since the last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._active = datamodule_of(trainer).audit
        self._step, self._keys = trainer.global_step, []
        if self._active and trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                file.truncate(_end_of_step(file, self._step))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: VideoBatch | PreferenceBatch,
        batch_idx: int,
    ) -> None:
        if not self._active:
            return
        self._keys.append([without_folder(key) for key in batch.keys])
        if trainer.global_step == self._step:
            return
        ranks: list[Any] = [self._keys] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(ranks, self._keys)
        self._step, self._keys = trainer.global_step, []
        if trainer.is_global_zero:
            shares = ranks[:: _readers(trainer)]
            micro_batches = [keys for turn in zip(*shares, strict=True) for keys in turn]
            line = {"step": self._step, "keys": [key for keys in micro_batches for key in keys]}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _readers(trainer: Trainer) -> int:
    """Returns the number of consecutive ranks that read the same batches."""
    return trainer.world_size // data_rank(trainer)[1]


def _end_of_step(file: BinaryIO, step: int) -> int:
    """Returns the number of bytes of the complete lines up to `step`."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        end += len(line)
    return end


def without_folder(key: str) -> str:
    """Removes the path or URL before the shard name: `…/shard.tar/sample` -> `shard.tar/sample`."""
    return re.sub(r"^.*/(?=[^/]*\.tar/)", "", key)
