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
visuals      uint8 (t c h w), seconds     input_ids, labels (l), prompt_ids (k)
    |                                     |
    +------------------+------------------+
                       |  collate         pad on the right
                       v
VideoBatch   input_ids (b l)   labels (b l)   prompt_ids (b k)
             visuals: one per slot, in the order of the slots; views of one tensor `pixels`
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from datamodules.base import StepsDataModule
from datamodules.batch import (
    IGNORE_INDEX,
    Task,
    VideoBatch,
    Visual,
    data_rank,
    pad_rows,
    visual_fields,
)
from datamodules.common.digest import digest
from datamodules.sample.conversation import (
    ConversationEncoder,
    EncodedConversation,
    parse_entry,
    read_entry,
)
from datamodules.sample.draw import with_draws
from datamodules.sample.outline import Outline
from datamodules.sample.question import encode_task, read_task
from datamodules.stream.budget import BudgetOrder
from datamodules.stream.index import Manifest, join, read_manifest
from datamodules.stream.lengths import read_tokens
from datamodules.stream.loader import EpochStream, Faults, StreamLoader
from datamodules.stream.mixture import MixtureOrder, mix, read_parts
from datamodules.stream.order import FileOrder, ShuffledOrder, StreamOptions
from datamodules.visuals.frames import FrameReader

logger = logging.getLogger(__name__)


@dataclass
class Sample:
    key: str
    text: EncodedConversation
    visuals: list[Visual]
    task: Task | None = None


def decode_sample(
    raw: dict[str, Any],
    frames: FrameReader,
    conversation: ConversationEncoder,
    drawn: tuple[int, int] | None = None,
) -> Sample:
    """Decodes a raw sample into ids and frames. The text comes first: it is cheaper to refuse.

    Args:
        drawn: seed and epoch of the `draw` of each visual; None: they have none.

    Raises:
        BadSampleError: the sample cannot be used.
    """
    entry = read_entry(raw)
    turns, suffixes = parse_entry(entry, raw)
    task = read_task(entry, turns)
    # The guide prompt must not show the answer of a test question to the pooler.
    text = conversation(turns, prompt_with_answers=False if task else None)
    key = f"{raw['__url__']}/{raw['__key__']}"
    visuals = read_visuals(raw, suffixes, frames, drawn)
    return Sample(key, text, visuals, task and encode_task(task, conversation))


def read_visuals(
    raw: dict[str, Any],
    suffixes: Iterable[str],
    frames: FrameReader,
    drawn: tuple[int, int] | None,
) -> list[Visual]:
    """Decodes the members with these suffixes; `drawn` is as in `decode_sample`.

    Raises:
        BadSampleError: a member cannot be read.
    """
    visuals = [frames.read(suffix, raw[suffix]) for suffix in suffixes]
    return visuals if drawn is None else with_draws(visuals, *drawn, raw["__key__"])


def collate(samples: Sequence[Sample], *, pad_id: int, prompt_pad_id: int) -> VideoBatch:
    """Stacks samples into a batch. A batch with one visual shares the frames of its sample."""
    texts = [sample.text for sample in samples]
    return VideoBatch(
        input_ids=pad_rows([text.input_ids for text in texts], pad_id),
        attention_mask=pad_rows([[1] * len(text.input_ids) for text in texts], 0).bool(),
        labels=pad_rows([text.labels for text in texts], IGNORE_INDEX),
        prompt_ids=pad_rows([text.prompt_ids for text in texts], prompt_pad_id),
        prompt_mask=pad_rows([[1] * len(text.prompt_ids) for text in texts], 0).bool(),
        keys=[sample.key for sample in samples],
        tasks=[sample.task for sample in samples],
        **visual_fields([visual for sample in samples for visual in sample.visuals]),
    )


def collater(conversation: ConversationEncoder) -> Callable[[list[Sample]], VideoBatch]:
    """Returns the function samples -> batch, with the padding of the text encoder."""
    return partial(
        collate,
        pad_id=cast(int, conversation.tokenizer.pad_token_id),
        prompt_pad_id=cast(int, conversation.prompt_tokenizer.pad_token_id),
    )


class InstructDataModule(StepsDataModule):
    """Streams shards of `<key>.json` (LLaVA conversation) with `<key>.mp4`, `<key>.0.jpg`, ...

    Args:
        train: training shards: paths, folders, globs, `http(s)://` or `pipe:` urls, {braces}; or
            a mixture `{name: {shards: ..., weight: 2.0}}`. Without weights, sizes are the weights.
        val: validation shards, read in order. Nothing is left out; if the number of ranks does not
            divide the number of batches, some ranks repeat the first batches.
        frames: the reader of visuals.
        conversation: makes the text encoder; a partial, so that the tokenizer is loaded only with
            the first data.
        batch_size, global_batch_size, audit: as in `StepsDataModule`. With `stream.max_tokens`, a
            training batch has at most `batch_size` samples; batches per step do not change.
        stream: options for shuffling and reading.
    """

    def __init__(
        self,
        train: str | Iterable[str] | Mapping[str, Any] | None,
        val: str | Iterable[str] | None,
        frames: FrameReader,
        conversation: Callable[[], ConversationEncoder],
        batch_size: int = 1,
        global_batch_size: int | None = None,
        stream: StreamOptions = StreamOptions(),  # noqa: B008 - frozen
        audit: bool = False,
    ):
        key = "data.stream.on_changed"
        super().__init__(batch_size, global_batch_size, audit, stream.on_changed, key)
        self._parts = read_parts(train) if isinstance(train, Mapping) else None
        self._shards = {
            "train": [part.shards for part in self._parts] if self._parts else [train],
            "val": [val],
        }
        self._frames, self._make_conversation = frames, conversation
        self._options = stream
        self.faults = {
            "train": Faults(stream.on_bad_sample or "skip", stream.max_bad_rate),
            "val": Faults(stream.on_bad_sample or "raise"),
        }
        self._read: dict[str, list[Manifest]] = {}
        self._manifests: dict[str, list[Manifest]] = {}
        self._conversation: ConversationEncoder | None = None
        self._fingerprint: str | None = None
        self._budget: BudgetOrder | None = None

    def prepare_data(self) -> None:
        """Makes missing indexes once per node, before the ranks of the node read them."""
        for split in self._splits(self.trainer.state.fn if self.trainer else None):
            self._read_manifests(split)

    def setup(self, stage: str | None = None) -> None:
        for split in self._splits(stage):
            if split in self._manifests:
                continue
            self._manifests[split] = self._read_manifests(split)
            for manifest in self._manifests[split]:
                self.faults[split].add_shards(manifest.faults, len(manifest.shards))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.conversation.tokenizer

    @property
    def conversation(self) -> ConversationEncoder:
        if self._conversation is None:
            self._conversation = self._make_conversation()
        return self._conversation

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            order, options = self._train_order(), self._options
            data = digest(*(each.fingerprint() for each in self._manifests["train"]))
            self._fingerprint = (
                f"data {data} seed {options.seed} {order.described} "
                f"window {options.window} chunk {options.chunk} "
                f"batch {self.batch_size} step {self.per_step}"
            )
        return self._fingerprint

    def validation_fingerprint(self) -> str | None:
        if self._shards["val"] == [None]:
            return None
        return join(self._manifests_of("val")).fingerprint()

    def describe(self) -> dict[str, Any]:
        manifest, conversation = join(self._manifests_of("val")), self.conversation
        template = conversation.tokenizer.get_chat_template()
        return {
            "data": manifest.fingerprint(),
            "samples": len(manifest),
            "frames": described(self._frames),
            "chat_template": digest(template),
            "max_length": conversation.max_length,
            "max_prompt_length": conversation.max_prompt_length,
        }

    def train_dataloader(self) -> StreamLoader:
        order = self._train_order()
        loader = self._loader("train", order, position=self._position)
        self._end_in_steps(len(order), loader.world)
        if self._budget is not None:
            self._budget.trained = self._batches
        return loader

    def val_dataloader(self) -> StreamLoader | list:
        if self._shards["val"] == [None]:
            return []
        return self._loader("val", FileOrder(join(self._manifests_of("val")), self.batch_size))

    def teardown(self, stage: str | None = None) -> None:
        for split, faults in self.faults.items():
            if faults.counts and self._rank == 0:
                logger.warning("%s: %s", split, faults.summary())

    def _train_order(self) -> ShuffledOrder | MixtureOrder | BudgetOrder:
        options = self._options
        if options.max_tokens is None:
            return self._order(options, self.batch_size, self.per_step)
        if self._budget is None:
            samples = self._order(replace(options, virtual_streams=None), 1, 1)
            manifest = join(self._manifests_of("train"))
            tokens = read_tokens(manifest, self._frames.sampler, options)
            batch, per_step = self.batch_size, self.per_step
            self._budget = BudgetOrder(samples, tokens, options.max_tokens, batch, per_step)
            if self._rank == 0 and (longer := self._budget.too_long):
                logger.warning(
                    f"{longer} of {len(tokens)} samples are longer than "
                    f"data.stream.max_tokens={options.max_tokens}, the longest has {tokens.max()} "
                    "tokens: each of them becomes a batch of its own"
                )
        return self._budget

    def _order(
        self, options: StreamOptions, micro_batch: int, per_step: int
    ) -> ShuffledOrder | MixtureOrder:
        manifests = self._manifests_of("train")
        if self._parts is None:
            return ShuffledOrder(manifests[0], micro_batch, options, per_step)
        return mix(self._parts, manifests, options, micro_batch, per_step)

    @property
    def even(self) -> bool:
        return self._options.max_tokens is None

    def _samples_before(self, epoch: int, micro_batches: int) -> int:
        if self._budget is None:
            return super()._samples_before(epoch, micro_batches)
        return self._budget.samples_before(epoch, micro_batches)

    def _splits(self, stage: str | None = None) -> list[str]:
        """Returns the splits to read. Validation alone does not need the training shards."""
        wanted = ("val",) if stage == "validate" else self._shards
        return [split for split in wanted if self._shards[split] != [None]]

    def _read_manifests(self, split: str) -> list[Manifest]:
        options = self._options
        if split not in self._read:
            self._read[split] = [
                read_manifest(shards, timeout_s=options.timeout_s, cache=options.index_cache)
                for shards in self._shards[split]
                if shards is not None
            ]
        return self._read[split]

    def _manifests_of(self, split: str) -> list[Manifest]:
        if split not in self._splits():
            raise ValueError(f"no shards to read; set data.{split}")
        if split not in self._manifests:
            self.setup()
        return self._manifests[split]

    def _loader(
        self, split: str, order: FileOrder | MixtureOrder | BudgetOrder, **position: Any
    ) -> StreamLoader:
        batch = self.collater()
        rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
        manifest, timeout_s = join(self._manifests[split]), self._options.timeout_s

        def stream_at(epoch: int) -> EpochStream:
            decode = self.decoder((self._options.seed, epoch) if split == "train" else None)
            return EpochStream(manifest, order.epoch(epoch), decode, batch, timeout_s)

        return StreamLoader(
            stream_at,
            order,
            self.faults[split],
            rank=rank,
            world=world,
            num_workers=self._options.num_workers,
            **position,
        )

    def decoder(self, drawn: tuple[int, int] | None = None) -> Callable[[dict[str, Any]], Any]:
        """Returns the function raw sample -> sample. It raises BadSampleError for a bad one.

        `drawn` is as in `decode_sample`.
        """
        return partial(
            decode_sample, frames=self._frames, conversation=self.conversation, drawn=drawn
        )

    def collater(self) -> Callable[[list[Any]], Any]:
        """Returns the function samples -> batch."""
        return collater(self.conversation)

    def outlined(self, outline: Outline) -> Any:
        count, options = self.batch_size, self._options
        if options.max_tokens is not None:  # the same rule as in BudgetOrder
            tokens = outline.tokens(options.tokens_per_frame or 0, options.tokens_per_image)
            count = max(1, min(count, options.max_tokens // tokens))
        return self.collater()([self.outlined_sample(outline)] * count)

    def outlined_sample(self, outline: Outline) -> Any:
        """Returns what `decoder` would return for a sample of these sizes."""
        text = self.conversation.outlined(outline)
        return Sample("outline", text, list(outline.visuals))

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0


def described(made: Any) -> dict[str, Any]:
    """Returns an object's settings as plain containers, including those of nested objects."""
    settings = {k: described(v) if hasattr(v, "__dict__") else v for k, v in vars(made).items()}
    return {"name": type(made).__name__, **settings}
