"""Instruction tuning on videos, images and text: shards -> `VideoBatch`.

+--------------------------------------------------------------------------+
| shards   k1.json k1.mp4 | k2.json k2.0.jpg k2.1.jpg | k3.json | ...       |
+--------------------------------------------------------------------------+
    |  stream.py        order of the run, split by rank and worker
    v
raw sample   {"__key__": "k1", "json": bytes, "mp4": bytes}
    |                                     |
    |  frames.py   sample, decode,        |  conversation.py   turns -> ids,
    v              resize                 v                    labels, slots
visuals      uint8 (t c h w) each         input_ids, labels (l), prompt_ids (k)
    |                                     |
    +------------------+------------------+
                       |  collate         pad on the right
                       v
VideoBatch   input_ids (b l)   labels (b l)   frames (n c h w)   prompt_ids (b k)
             frame_counts: frames of each of the v visuals, in the order of their slots
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VideoBatch, pad_rows
from datamodules.conversation import (
    ConversationEncoder,
    EncodedConversation,
    is_video,
    parse_sample,
)
from datamodules.frames import FrameReader
from datamodules.index import Manifest, read_manifest
from datamodules.order import FileOrder, ShuffledOrder, StreamOptions
from datamodules.stream import EpochStream, Faults, StreamLoader, trained_on

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    key: str
    text: EncodedConversation
    visuals: list[Tensor]  # uint8 (t c h w), t of each its own


def decode_sample(
    raw: dict[str, Any], frames: FrameReader, conversation: ConversationEncoder
) -> Sample:
    """A raw sample -> ids and frames; the text first, as it is the cheaper one to refuse.

    Raises:
        BadSampleError: whatever is wrong with it.
    """
    turns, suffixes = parse_sample(raw)
    text = conversation(turns)
    visuals = [
        frames.video(raw[suffix]) if is_video(suffix) else frames.image(raw[suffix])
        for suffix in suffixes
    ]
    return Sample(f"{raw['__url__']}/{raw['__key__']}", text, visuals)


def collate(
    samples: Sequence[Sample], *, image_size: int, pad_id: int, prompt_pad_id: int
) -> VideoBatch:
    """Stacks samples; without any visual the batch has frames (0 c h w)."""
    visuals = [visual for sample in samples for visual in sample.visuals]
    none = torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8)
    texts = [sample.text for sample in samples]
    return VideoBatch(
        input_ids=pad_rows([text.input_ids for text in texts], pad_id),
        attention_mask=pad_rows([[1] * len(text.input_ids) for text in texts], 0).bool(),
        labels=pad_rows([text.labels for text in texts], IGNORE_INDEX),
        frames=torch.cat([none, *visuals]),  # v x (t c h w) -> n c h w
        frame_counts=[visual.shape[0] for visual in visuals],
        prompt_ids=pad_rows([text.prompt_ids for text in texts], prompt_pad_id),
        prompt_mask=pad_rows([[1] * len(text.prompt_ids) for text in texts], 0).bool(),
        keys=[sample.key for sample in samples],
    )


class InstructDataModule(LightningDataModule):
    """Streams shards of `<key>.json` (LLaVA conversation) with `<key>.mp4`, `<key>.0.jpg`, ...

    Args:
        train: shards to train on: paths, folders, globs, `http(s)://` or `pipe:` urls, {braces}.
        val: shards to validate on, read in order; the ranks repeat the first batches where their
            number does not divide, and nothing is left out.
        frames: reads visuals.
        conversation: encodes text; a partial, so that a tokenizer is loaded with the first data.
        batch_size: samples of one batch of one rank: the micro-batch.
        stream: how samples are shuffled and read.
        num_workers: processes that read and decode, a rank.
        on_bad_sample: `skip` counts a bad sample and takes the next good one, `raise` stops;
            `None` skips in training and raises in evaluation.
    """

    def __init__(
        self,
        train: str | Iterable[str] | None,
        val: str | Iterable[str] | None,
        frames: FrameReader,
        conversation: Callable[[], ConversationEncoder],
        batch_size: int = 1,
        stream: StreamOptions = StreamOptions(),  # noqa: B008 - frozen
        num_workers: int = 0,
        on_bad_sample: str | None = None,
    ):
        super().__init__()
        self._shards = {"train": train, "val": val}
        self._frames, self._make_conversation = frames, conversation
        self._batch_size, self._options, self._workers = batch_size, stream, num_workers
        self.faults = {
            "train": Faults(on_bad_sample or "skip"),
            "val": Faults(on_bad_sample or "raise"),
        }
        self._manifests: dict[str, Manifest] = {}
        self._conversation: ConversationEncoder | None = None

    def prepare_data(self) -> None:
        """Makes missing indexes once a node, before its ranks read them."""
        for split in self._splits():
            self._read_manifest(split)

    def setup(self, stage: str | None = None) -> None:
        for split in self._splits():
            if split in self._manifests:
                continue
            manifest = self._manifests[split] = self._read_manifest(split)
            # What is wrong with whole shards is the same for all ranks: one of them tells it.
            for fault in manifest.faults if self._rank == 0 else []:
                self.faults[split].add(fault)

    @property
    def conversation(self) -> ConversationEncoder:
        if self._conversation is None:
            self._conversation = self._make_conversation()
        return self._conversation

    def train_dataloader(self) -> StreamLoader:
        manifest = self._manifest("train")
        order = ShuffledOrder(manifest, self._batch_size, self._options)
        return self._loader("train", order, position=lambda: trained_on(self.trainer))

    def val_dataloader(self) -> StreamLoader | list:
        if self._shards["val"] is None:
            return []
        return self._loader("val", FileOrder(self._manifest("val"), self._batch_size))

    def teardown(self, stage: str | None = None) -> None:
        for split, faults in self.faults.items():
            if faults.counts:
                logger.warning("%s, rank %d: %s", split, self._rank, faults.summary())

    def _splits(self) -> list[str]:
        return [split for split, shards in self._shards.items() if shards is not None]

    def _read_manifest(self, split: str) -> Manifest:
        shards = self._shards[split]
        assert shards is not None
        options = self._options
        return read_manifest(shards, timeout_s=options.timeout_s, cache=options.index_cache)

    def _manifest(self, split: str) -> Manifest:
        if self._shards[split] is None:
            raise ValueError(f"no shards to read; set data.{split}")
        if split not in self._manifests:
            self.setup()
        return self._manifests[split]

    def _loader(self, split: str, order: FileOrder, **position: Any) -> StreamLoader:
        conversation = self.conversation
        decode = partial(decode_sample, frames=self._frames, conversation=conversation)
        batch = partial(
            collate,
            image_size=self._frames.image_size,
            pad_id=cast(int, conversation.tokenizer.pad_token_id),
            prompt_pad_id=cast(int, conversation.prompt_tokenizer.pad_token_id),
        )
        manifest, timeout_s = self._manifests[split], self._options.timeout_s
        return StreamLoader(
            lambda epoch: EpochStream(manifest, order.epoch(epoch), decode, batch, timeout_s),
            order,
            self.faults[split],
            rank=self._rank,
            world=self.trainer.world_size if self.trainer else 1,
            num_workers=self._workers,
            **position,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0
