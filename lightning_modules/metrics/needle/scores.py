"""Scores of V-NIAH and V-NIAH-D: needle accuracy, and canaries that show it is valid."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from datamodules.base import datamodule_of
from datamodules.batch import IGNORE_INDEX, VideoBatch, Visual, VisualInfo
from lightning_modules.distributed.sharding import shard
from lightning_modules.encoder.base import Encoder
from lightning_modules.metrics.answers.lines import as_text
from lightning_modules.metrics.bootstrap import bootstrap_interval
from lightning_modules.metrics.needle.prefix import PrefixCache, first_predicting
from lightning_modules.model import VideoLanguageModel
from lightning_modules.tokens import VisualTokens

#: Frames that the encoder reads at a time.
_ENCODED_AT_ONCE = 64

#: Rows of a cell are read together while they have at most this many tokens in all. Longer rows
#: fill a GPU alone, and each row of several needs its own copy of the KV cache.
BATCH_TOKENS = 65_536


@dataclass
class NeedleScores:
    """The cells of every condition, and the data of the canaries."""

    cells: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: By needle: the question as the LLM reads it, and the right answer.
    asked: dict[int, dict[str, str]] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    #: By number of frames: depth of the changed frame, and largest change of a logit.
    sensitivity: dict[int, tuple[float, float]] = field(default_factory=dict)
    token_forwards: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Returns `conditions`, `canaries` and `token_forwards` in the format of a report."""
        tested = [name for name in self.cells if name not in ("blind", "ceiling")]
        return {
            "conditions": {name: self._condition(name) for name in tested},
            "canaries": {
                "blind": self._canary("blind"),
                "ceiling": self._canary("ceiling"),
                "sensitivity": self._sensitivity(),
            },
            "token_forwards": self.token_forwards,
            "asked": self.asked,
        }

    def mean(self, name: str) -> float:
        return bootstrap_interval([cell["correct"] for cell in self.cells[name]]).mean

    def _condition(self, name: str) -> dict[str, Any]:
        cells = self.cells[name]
        found = bootstrap_interval(
            [cell["correct"] for cell in cells], [cell["needle"] for cell in cells]
        )
        return {"cells": cells, "mean": found.mean, "interval": [found.low, found.high]}

    def _canary(self, name: str) -> dict[str, Any]:
        condition = self._condition(name)
        counts = [list(self.answers.values()).count(a) for a in set(self.answers.values())]
        return {
            "mean": condition["mean"],
            "interval": condition["interval"],
            "n": len(condition["cells"]),
            "majority": max(counts) / sum(counts),
        }

    def _sensitivity(self) -> dict[str, int | float]:
        """Returns the result for the video length at which the logits changed least."""
        frames, (depth, change) = min(self.sensitivity.items(), key=lambda item: item[1][1])
        return {"frames": frames, "depth": depth, "max_logit_change": change}


class NeedleModule(LightningModule):
    """Scores a `HaystackDataModule`'s rows: `trainer.test(NeedleModule(model), datamodule)`.

    An answer is right if each of its tokens has the highest logit, given the tokens before it, as
    in the published harness. Three canaries test the measurement itself. `blind` has no needle, and
    `ceiling` has only the needle. The third compares the logits with and without a needle at depth
    0.5. They must differ at every length; otherwise the model does not see the middle of the video
    (the published harness did not).

    A frame of the haystack is one time step of the video, whatever the encoder.

    Args:
        protocol: facts that are written beside the numbers, unchanged.
        folder: folder for `needle.json`; None: no file is written.
        batch_tokens: rows of a cell are read together while they have at most this many tokens.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        protocol: dict[str, Any] | None = None,
        folder: str | Path | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        super().__init__()
        self.batch_tokens = batch_tokens
        self.model = model
        self.protocol = protocol or {}
        self.folder = Path(folder) if folder else None
        self.scores = NeedleScores()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.model, self.model.blocks(), self.device_mesh)

    @torch.no_grad()
    def on_test_start(self) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.unshard()  # for calls of single parts; blocks gather their own weights
        self.scores = NeedleScores()
        self._prefixes = PrefixCache(self.model)
        self._blind_logits: dict[tuple[int, float], list[Tensor]] = {}
        self._bank = datamodule_of(self.trainer).bank
        if self.model.encoder.per_frame:
            parts = (part.to(self.device) for part in self._bank.split(_ENCODED_AT_ONCE))
            self._patches = encode_frames(self.model.encoder, parts)

    def test_step(self, row: Any, batch_idx: int) -> None:
        tokenizer = datamodule_of(self.trainer).tokenizer
        cells = self.scores.cells.setdefault(row.condition, [])
        all_logits = []
        for i, (logits, target) in enumerate(self._answers(row)):
            needle = row.needles[i]
            log_prob = logits.log_softmax(-1).gather(1, target[:, None]).sum()
            cells.append(
                {
                    "frames": row.frames,
                    "depth": row.depth,
                    "needle": needle,
                    "correct": bool((logits.argmax(-1) == target).all()),
                    "log_prob": round(log_prob.item(), 4),
                    "said": str(tokenizer.decode(logits.argmax(-1), skip_special_tokens=True)),
                }
            )
            self.scores.answers[needle] = str(target.tolist())
            if needle not in self.scores.asked:
                self.scores.asked[needle] = _asked(row.text, i, tokenizer)
            all_logits.append(logits)
        self._compare(row, all_logits)

    def on_test_end(self) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def on_test_epoch_end(self) -> None:
        counts = {"computed": self._prefixes.computed, "recomputed": self._prefixes.recomputed}
        self.scores.token_forwards = counts
        for name in self.scores.cells:
            self.log(f"needle/{name}", self.scores.mean(name), sync_dist=True)
        if self.folder is not None and self.trainer.is_global_zero:
            text = json.dumps({**self.protocol, **self.scores.summary()}, indent=1)
            (self.folder / "needle.json").write_text(text)

    def _answers(self, row: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the logits (answer tokens, vocabulary) and the right tokens of each needle."""
        encoder, (height, width) = self.model.encoder, self._bank.shape[-2:]
        frames = row.frames * (encoder.frames_per_step if encoder.per_frame else 1)
        video = self.model.num_tokens(frames, height, width)
        length = video + row.text.input_ids.shape[1]
        at_once = max(1, self.batch_tokens // length)
        for first in range(0, len(row.needles), at_once):
            rows = range(first, min(first + at_once, len(row.needles)))
            text = row.text.select(rows)
            inputs = self.model.compose(text, self._encoded(row.order[rows], text.infos))
            start = first_predicting(inputs.labels)
            hidden = self._prefixes.hidden(inputs, start)
            for states, labels in zip(hidden, inputs.labels[:, start:], strict=True):
                target = labels[1:]
                learnt = target != IGNORE_INDEX
                yield self.model.llm.head(states[:-1][learnt]).float(), target[learnt]

    def _encoded(
        self, orders: Int[Tensor, "b t"], infos: Sequence[VisualInfo]
    ) -> list[VisualTokens]:
        """Returns the tokens of the video of each row."""
        videos = zip(orders, infos, strict=True)
        if self.model.encoder.per_frame:
            return [
                VisualTokens.on_grid(self._patches[order], seconds=info.seconds)
                for order, info in videos
            ]
        return self.model.encoder(
            [Visual(self._bank[order.cpu()].to(self.device), info) for order, info in videos]
        )

    def _compare(self, row: Any, logits: list[Tensor]) -> None:
        """Records how much the needle frame changes the logits of the blind row."""
        place = (row.frames, row.depth)
        if row.condition == "blind":
            self._blind_logits[place] = logits
        elif place in self._blind_logits:
            blind = self._blind_logits.pop(place)
            change = max((a - b).abs().max().item() for a, b in zip(blind, logits, strict=True))
            self.scores.sensitivity[row.frames] = (row.depth, change)


def encode_frames(
    encoder: Encoder, parts: Iterable[UInt8[Tensor, "_n c h w"]]
) -> Float[Tensor, "n h w d"]:
    """Returns the tokens of frames that come some at a time, which bounds what the encoder takes.

    Each frame is one time step. An encoder that reads several frames as a step gets each frame
    alone and repeats it, as the published harness does with Qwen2-VL.
    """
    encoded = []
    for part in parts:
        alone = part.split(1 if encoder.frames_per_step > 1 else len(part))
        encoded += [tokens.as_grid() for tokens in encoder([Visual(each) for each in alone])]
    return torch.cat(encoded)


def _asked(text: VideoBatch, row: int, tokenizer: Any) -> dict[str, str]:
    """Returns the prompt of a row as the LLM reads it, and its right answer."""
    asked = text.questions()
    prompt = as_text(asked.input_ids[row][asked.attention_mask[row]].tolist(), tokenizer)
    answer = tokenizer.decode(text.answers()[row], skip_special_tokens=True)
    return {"prompt": prompt, "answer": answer.strip()}
