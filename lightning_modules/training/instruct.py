"""Instruction tuning: training steps, logging and checkpoints around a `VideoLanguageModel`."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from datamodules.base import datamodule_of
from datamodules.batch import VideoBatch
from lightning_modules.metrics.answers import FULL
from lightning_modules.metrics.answers.generate import read_answers
from lightning_modules.metrics.base import Answered, Score
from lightning_modules.metrics.distinct import DistinctMeans
from lightning_modules.model import Output, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.base import TrainingModule


def _all_of_it(batch: VideoBatch) -> VideoBatch:
    return batch


class VideoLLMModule(TrainingModule[VideoLanguageModel]):
    """Trains a `VideoLanguageModel` on the answers of conversations.

    Args:
        packing: maximum tokens of a row that samples share in training; a longer sample raises it.
            `None` gives each sample its own row. The loss is the same.
        scores: validation scores besides the loss, under any names. After each validation,
            `scored` holds their values by name.

    Attributes:
        in_bar: names of the numbers in the progress bar.
        condition: name of what the model sees of a validation batch; `full` is all of it. Numbers
            of other conditions are logged as `CONDITION/…` in place of `val/…`.
        see: batch -> what the model sees of it.
        scored_at: step of the last validation under the condition `full`.
    """

    in_bar: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        *arguments: Any,
        packing: int | None = None,
        scores: Mapping[str, Score] | None = None,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        if packing is not None and packing < 1:
            raise ValueError(f"module.packing is {packing}; set a number of tokens, or null")
        self.packing = packing
        self.scores = nn.ModuleDict(scores)
        self.scored: dict[str, dict[str, Any]] = {}
        self.means = DistinctMeans()
        self.condition = FULL
        self.see: Callable[[VideoBatch], VideoBatch] = _all_of_it
        self.scored_at: int | None = None

    def build(self) -> VideoLanguageModel:
        return VideoLanguageModel(VideoLanguageModelConfig(**self.spec))

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        output: Output = self.network(batch, packing=self.packing)
        mask, pooler = output.inputs.mask, self.network.pooler
        sums: dict[str, Tensor | float | int] = {"tokens": mask.sum(), "cells": mask.numel()}
        if pooler.uses_prompt:
            effective = pooler.last_effective_tokens
            known = effective is not None  # a rank without visuals may know none
            sums |= {"effective": effective if known else 0.0, "pooled": int(known)}
        return self.add_to_step(*self.terms(output), len(batch), **sums)

    def terms(self, output: Output) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Returns the loss of a micro-batch, summed over its terms, and the number of terms."""
        return output.losses.sum(), output.labelled

    def log_step(self, sums: Mapping[str, float]) -> None:
        super().log_step(sums)
        self.log("train/tokens", sums["tokens"], batch_size=1)
        self.log("train/padding", 1 - sums["tokens"] / max(1.0, sums["cells"]), batch_size=1)
        if sums.get("pooled"):
            effective = sums["effective"] / sums["pooled"]
            self.log("pooler/effective_tokens", effective, batch_size=1)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> list[Answered]:
        """Adds a batch to loss and scores. Returns the answers, which callbacks write down."""
        batch = self.see(batch)
        output: Output = self.network(batch)
        self.means.update(batch.keys, output.counts, {"loss": output.losses})
        scores = list(self.score_by_name.values())
        if not scores:
            return []
        answers = read_answers(self.network, batch, output, scores, self._tokenizer)
        for score in scores:
            score.update(answers)
        return answers

    @property
    def score_by_name(self) -> dict[str, Score]:
        return {name: score for name, score in self.scores.items() if isinstance(score, Score)}

    def has_questions(self) -> bool:
        """Returns whether the last validation had a sample with a question that a score judges."""
        return any(s.terms_by_sample and not s.asks(None) for s in self.score_by_name.values())

    def _tokenizer(self) -> Any:
        return datamodule_of(self.trainer).tokenizer

    def on_validation_epoch_end(self) -> None:
        prefix = "val" if self.condition == FULL else self.condition
        for name, value in self.means.compute().items():
            # Every rank computes the same number, from the samples of all ranks.
            options = {"prog_bar": name in self.in_bar, "reduce_fx": "max"}
            self.log(f"{prefix}/{name}", value, sync_dist=True, **options)
        self.means.reset()
        self.scored = {}
        for score in self.score_by_name.values():
            for name, (value, count) in score.compute().items():
                self.scored[name] = {"value": value, "count": count, **score.facts(name)}
                self.log(f"{prefix}/{name}", value, sync_dist=True, reduce_fx="max")
            score.reset()
        if self.condition == FULL:
            self.scored_at = self.trainer.global_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the components' specs with the weights, as plain containers."""
        super().on_save_checkpoint(checkpoint)
        config = self.network.config
        parts = dict.fromkeys([*self.spec, "positions"])
        checkpoint["stages"] = {part: getattr(config, part) for part in parts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights with another rotary scheme, pooler, LoRA and so on, or without an LLM.

        Raises:
            ValueError: a component differs; the message names it and both specs.
        """
        super().on_load_checkpoint(checkpoint)
        stages = checkpoint.get("stages", {})
        if stages and "llm" not in stages:
            raise ValueError(
                f"the checkpoint holds {', '.join(stages)} alone, but this run trains an llm too: "
                "choose the module that it was trained with, or another run directory"
            )
        for stage in ("rotary", "pooler", "positions", "lora", "tiles"):
            trained, asked = stages.get(stage), getattr(self.network.config, stage)
            if stages and trained != asked:
                raise ValueError(
                    f"the checkpoint was trained with {stage} {trained}, this run has {asked}: "
                    f"choose that {stage}, or another run directory"
                )
