"""Preference tuning on pairs of answers about visuals: shards -> `PreferenceBatch`.

+-----------------------------------------------------------------------------------+
| k1.json k1.mp4 | ...   {"conversations": [{"from": "human", "value": "<video>\\n.."}], |
|                         "chosen": "..", "rejected": "..", "reference": {..}}      |
+-----------------------------------------------------------------------------------+
    |  stream.py, as in instruct.py
    v
Pair             chosen, rejected: ids with labels on this answer only; both share the prompt and
    |            the visuals; reference: log-probabilities of the frozen reference model
    |  collate_pairs
    v
PreferenceBatch  chosen, rejected: VideoBatch with the same frames; reference (b 2)
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import IGNORE_INDEX, PreferenceBatch, VideoBatch, Visual
from datamodules.common.digest import digest_settings
from datamodules.errors import BadSampleError
from datamodules.instruct import InstructDataModule, Sample, described, read_visuals
from datamodules.sample.conversation import (
    ConversationEncoder,
    EncodedConversation,
    match_visuals,
    read_entry,
    read_turns,
)
from datamodules.sample.outline import Outline
from datamodules.stream.index import Manifest, Shard, join
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FrameReader

logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected")


@dataclass
class Pair:
    key: str
    chosen: EncodedConversation
    rejected: EncodedConversation
    visuals: list[Visual]
    reference: tuple[float, float] | None  # log-probabilities of chosen and rejected
    settings: dict[str, str]  # settings that `reference` was computed with


def decode_pair(
    raw: dict[str, Any],
    frames: FrameReader,
    conversation: ConversationEncoder,
    drawn: tuple[int, int] | None = None,
) -> Pair:
    """Decodes a raw sample into the ids of both answers, and frames.

    `drawn` is as in `decode_sample`.

    Raises:
        BadSampleError: no_preference (the answers are the same up to `max_length` tokens), or
            another reason why the sample cannot be used.
    """
    entry = read_entry(raw)
    asked = _question(entry)
    both = [read_turns({"conversations": [*asked, _answer(entry, name)]}) for name in ANSWERS]
    suffixes = match_visuals(both[0], raw)
    prompt = conversation.prompt(both[0][:-1])  # never contains the answer
    chosen, rejected = (
        EncodedConversation(encoded.input_ids, _last_answer(encoded.labels), prompt)
        for encoded in map(conversation, both)
    )
    if chosen.input_ids == rejected.input_ids:
        detail = f"the answers are the same in the first {conversation.max_length} tokens"
        raise BadSampleError("no_preference", detail)
    visuals = read_visuals(raw, suffixes, frames, drawn)
    reference, settings = _reference(entry)
    key = f"{raw['__url__']}/{raw['__key__']}"
    return Pair(key, chosen, rejected, visuals, reference, settings)


def _question(entry: Any) -> list[Any]:
    """Returns the turns before the answers. LLaVA-Hound's `prompt` becomes one turn."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if turns is None and isinstance(entry, dict) and "prompt" in entry:
        return [{"from": "human", "value": entry["prompt"]}]
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("missing_field", "conversations, with the question")
    return turns


def _answer(entry: dict[str, Any], name: str) -> dict[str, str]:
    text = entry.get(name)
    if not isinstance(text, str) or not text.strip():
        raise BadSampleError("missing_field", f"{name}, an answer")
    return {"from": "gpt", "value": text}


def _last_answer(labels: Sequence[int]) -> list[int]:
    """Keeps only the labels of the last answer: earlier answers belong to the question."""
    stop = max(n for n, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    before = (n for n in range(stop, 0, -1) if labels[n - 1] == IGNORE_INDEX)
    start = next(before, 0)
    outside = IGNORE_INDEX
    return [label if start <= n < stop else outside for n, label in enumerate(labels)]


def _reference(entry: dict[str, Any]) -> tuple[tuple[float, float] | None, dict[str, str]]:
    given = entry.get("reference")
    if given is None:
        return None, {}
    values = [given.get(name) for name in ANSWERS] if isinstance(given, dict) else []
    good = [v for v in values if isinstance(v, int | float) and math.isfinite(v) and v <= 0]
    settings = given.get("settings", {}) if isinstance(given, dict) else None
    if len(good) < len(ANSWERS) or not isinstance(settings, dict):
        raise BadSampleError("bad_field", f"reference must be two log-probabilities, not {given!r}")
    return (float(good[0]), float(good[1])), settings


def collate_pairs(
    pairs: Sequence[Pair], *, collate: Callable[[list[Sample]], VideoBatch]
) -> PreferenceBatch:
    chosen = collate([Sample(p.key, p.chosen, p.visuals) for p in pairs])
    rejected = collate([Sample(p.key, p.rejected, p.visuals) for p in pairs])
    known = [pair.reference for pair in pairs if pair.reference is not None]
    return PreferenceBatch(
        chosen,
        replace(rejected, pixels=chosen.pixels),
        torch.tensor(known) if len(known) == len(pairs) else None,
        [pair.settings for pair in pairs],
    )


class PreferenceDataModule(InstructDataModule):
    """Streams shards of `<key>.json` (a question, `chosen`, `rejected`) with their visuals.

    Takes the arguments of `InstructDataModule`.
    """

    def decoder(self, drawn: tuple[int, int] | None = None) -> Callable[[dict[str, Any]], Pair]:
        return partial(
            decode_pair, frames=self._frames, conversation=self.conversation, drawn=drawn
        )

    def collater(self) -> Callable[[list[Pair]], PreferenceBatch]:
        return partial(collate_pairs, collate=super().collater())

    def outlined(self, outline: Outline) -> PreferenceBatch:
        """Returns the largest batch, with a reference whose settings are unknown."""
        return replace(super().outlined(outline), settings=[])

    def outlined_sample(self, outline: Outline) -> Pair:
        """Returns a pair of two answers of the same length."""
        text, visuals = self.conversation.outlined(outline), list(outline.visuals)
        return Pair("outline", text, text, visuals, (0.0, 0.0), {})

    def shards(self) -> dict[str, Sequence[Shard]]:
        """Returns the shards of each split that has shards."""
        return {split: join(self._manifests_of(split)).shards for split in self._splits()}

    def settings(self) -> dict[str, str]:
        """Returns digests, by config key, of the settings that tokens and frames depend on."""
        text = self.conversation
        words = [
            [tokenizer.get_vocab(), tokenizer.chat_template]
            for tokenizer in (text.tokenizer, text.prompt_tokenizer)
        ]
        lengths = [text.max_length, text.max_prompt_length, text.prompt_with_answers]
        parts = {
            "data.frames": described(self._frames),
            "data.conversation": [*words, lengths],
        }
        return {key: digest_settings(value) for key, value in parts.items()}


class RawPairs(Dataset):
    """The samples of one shard in shard order, raw and decoded."""

    def __init__(self, shard: Shard, data: PreferenceDataModule, timeout_s: float):
        self._shard = shard
        self._reader = ShardReader(Manifest([shard], []), timeout_s)
        self._decode, self._collate = data.decoder(), data.collater()

    def __len__(self) -> int:
        return self._shard.count

    def __getitem__(self, number: int) -> tuple[dict[str, Any] | None, Pair | None]:
        """Returns (raw sample, pair). The pair of a bad sample is None.

        Both are None if the sample cannot be untarred.
        """
        raw = None
        try:
            raw = untar_sample(self._reader.read(0, number), self._shard.url)
            return raw, self._decode(raw)
        except BadSampleError as error:
            what = "left out" if raw is None else "left without a reference"
            logger.warning("%s [#%d] is %s: %s", self._shard.url, number, what, error)
            return raw, None

    def close(self) -> None:
        self._reader.close()

    def loader(self, batch_size: int, num_workers: int) -> DataLoader:
        """Returns a loader of (raw samples, indices of the good ones, batch of the good ones)."""
        together = partial(_together, collate=self._collate)
        return DataLoader(self, batch_size, num_workers=num_workers, collate_fn=together)


def _together(
    items: Sequence[tuple[dict[str, Any] | None, Pair | None]],
    collate: Callable[[list[Pair]], PreferenceBatch],
) -> tuple[list[dict[str, Any]], list[int], PreferenceBatch | None]:
    found = [(raw, pair) for raw, pair in items if raw is not None]
    good = [number for number, (_, pair) in enumerate(found) if pair is not None]
    pairs = [pair for _, pair in found if pair is not None]
    return [raw for raw, _ in found], good, collate(pairs) if pairs else None


def with_reference(
    raw: dict[str, Any], log_probs: Sequence[float], settings: dict[str, str]
) -> dict[str, Any]:
    """Returns the raw sample with its answers' log-probabilities and their settings added."""
    reference = {**dict(zip(ANSWERS, log_probs, strict=True)), "settings": settings}
    entry = {**json.loads(raw["json"]), "reference": reference}
    return {**raw, "json": json.dumps(entry, ensure_ascii=False, sort_keys=True).encode()}
