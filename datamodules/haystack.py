"""V-NIAH and V-NIAH-D: a needle image among the frames of real video, and the question it answers.

    haystack shards  k.mp4 k.json        needle shards  k.jpg k.json (one question, one answer)
          |  frames.py                         |  frames.py, conversation.py
          v                                    v
    clips, uint8 (t c h w)               needles: frame (c h w), question, answer
          |                                    |
          +---------------+--------------------+
                          |
          +---------------+--------------------+
          v training                           v evaluation
    a stretch of one clip with           one row = a condition, a length, a depth:
    several needles, a question          the same haystack with each needle in turn,
    about each: VideoBatch               distractors around it: NeedleRow

Needles with another question are each other's distractors. V-NIAH: LongVA, arXiv 2406.16852;
V-NIAH-D: VideoRoPE, arXiv 2502.05173, section 4.3.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int, UInt8
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import BadSampleError, VideoBatch
from datamodules.conversation import ConversationEncoder, Turn, is_video, parse_sample
from datamodules.distractors import Distractors
from datamodules.frames import FrameReader
from datamodules.index import read_manifest
from datamodules.instruct import Sample, collate
from datamodules.stream import Faults, ShardReader, StreamLoader, trained_on
from datamodules.tar import untar_sample

SPLITS = ("train", "test")

_VAL_SAMPLES, _VAL_SEED = 64, 2**31


@dataclass(frozen=True)
class Needle:
    """A picture and what only it answers."""

    frame: UInt8[Tensor, "c h w"]
    question: str
    answer: str
    key: str


@dataclass(frozen=True)
class TrainingPlan:
    """How training samples are drawn; the n-th is a function of the seed and n alone.

    Attributes:
        samples: of the whole training, over all ranks.
        frames: fewest and most frames of a sample, needles included.
        needles: most needles in one sample; each is a distractor for the others' questions.
        first_frames: the range that `frames` grows from, over the first `growth` of the samples:
            short videos are cheap and teach reading a needle before finding it.
    """

    samples: int
    frames: Sequence[int]
    needles: int = 5
    first_frames: Sequence[int] = (3, 8)
    growth: float = 0.5
    seed: int = 0

    def range_at(self, n: int) -> tuple[int, int]:
        """Fewest and most frames of the n-th sample."""
        done = min(1.0, n / max(1.0, self.growth * self.samples))
        low, high = (
            round(a + done * (b - a)) for a, b in zip(self.first_frames, self.frames, strict=True)
        )
        return low, high


@dataclass(frozen=True)
class GridPlan:
    """Cells of an evaluation: lengths x depths x needles, under every condition.

    Attributes:
        depths: where the needle stands, 0 the first and 1 the last frame.
        needles: how many; the questions take turns.
        conditions: name -> the distractors beside the needle; None for none.
    """

    frames: Sequence[int]
    depths: Sequence[float]
    needles: int
    conditions: Mapping[str, Distractors | None] = field(default_factory=lambda: {"plain": None})
    seed: int = 0


@dataclass
class NeedleRow:
    """The cells of one condition, length and depth, one needle a row.

    `order` says which frame of the bank stands where; `text` holds everything of the batch but
    the frames, which are a stand-in of the right count: the bank's are encoded once for all rows.
    """

    condition: str
    frames: int
    depth: float
    needles: list[int]
    order: Int[Tensor, "b t"]
    text: VideoBatch


class HaystackDataModule(LightningDataModule):
    """Haystacks of training and the grid of an evaluation, from shards.

    Args:
        haystack: shards of videos by split, `train` and `test`.
        needles: shards of needle images by split.
        frames: reads visuals; its sampler decides how many frames of each video make the haystack.
        conversation: encodes text; a partial, so that a tokenizer is loaded with the first data.
        training, grid: what is drawn from them.
        batch_size: samples of a batch of one rank.
    """

    def __init__(
        self,
        haystack: Mapping[str, str | Iterable[str]],
        needles: Mapping[str, str | Iterable[str]],
        frames: FrameReader,
        conversation: Callable[[], ConversationEncoder],
        training: TrainingPlan,
        grid: GridPlan,
        batch_size: int = 16,
    ):
        super().__init__()
        self._shards = {"haystack": haystack, "needles": needles}
        self._frames, self._make_conversation = frames, conversation
        self.training, self.grid, self.batch_size = training, grid, batch_size
        self._sets: dict[str, tuple[list[Tensor], list[Needle]]] = {}

    def prepare_data(self) -> None:
        """Makes missing indexes once a node, before its ranks read them."""
        for shards in self._shards.values():
            for split in SPLITS:
                read_manifest(shards[split])

    def setup(self, stage: str | None = None) -> None:
        if self._sets:
            return
        self.conversation = self._make_conversation()
        for split in SPLITS:
            clips = read_clips(self._shards["haystack"][split], self._frames)
            needles = read_needles(self._shards["needles"][split], self._frames)
            self._sets[split] = clips, needles
        self._grid = NeedleGrid(*self._sets["test"], self.grid, self._encode)

    @property
    def bank(self) -> UInt8[Tensor, "n c h w"]:
        """The frames that the rows' `order` counts."""
        return self._grid.bank

    def train_dataloader(self) -> StreamLoader:
        return self._loader("train", self.training, position=lambda: trained_on(self.trainer))

    def val_dataloader(self) -> StreamLoader:
        """One question about each of a few videos as long as those of training, all unseen."""
        plan = replace(self.training, samples=_VAL_SAMPLES, needles=1, growth=0.0, seed=_VAL_SEED)
        return self._loader("test", plan)

    def test_dataloader(self) -> "NeedleGrid":
        """Every rank goes through all rows: not a DataLoader, which Lightning would share out."""
        return self._grid

    def _encode(self, needles: Sequence[Needle], frames: int) -> VideoBatch:
        """One question a row about a video of so many frames, which are a stand-in."""
        stand_in = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        texts = [
            Sample(
                needle.key,
                self.conversation(_turns([needle])),
                [stand_in.expand(frames, -1, -1, -1)],
            )
            for needle in needles
        ]
        return self._collate(texts, image_size=1)

    def _collate(self, samples: list[Sample], image_size: int | None = None) -> VideoBatch:
        return collate(
            samples,
            image_size=image_size or self._frames.image_size,
            pad_id=cast(int, self.conversation.tokenizer.pad_token_id),
            prompt_pad_id=cast(int, self.conversation.prompt_tokenizer.pad_token_id),
        )

    def _loader(self, split: str, plan: TrainingPlan, **position: Any) -> StreamLoader:
        samples = HaystackSamples(*self._sets[split], plan, self.conversation)
        stream = HaystackStream(samples, self.batch_size, self._collate)
        rank, world = (
            (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        )
        faults = Faults("raise")
        return StreamLoader(
            lambda epoch: stream, stream, faults, rank=rank, world=world, **position
        )


class HaystackStream(Dataset):
    """Micro-batch m of all ranks together: the samples that follow those of micro-batch m - 1."""

    def __init__(
        self,
        samples: "HaystackSamples",
        batch_size: int,
        collate: Callable[[list[Sample]], VideoBatch],
    ):
        self._samples, self._batch_size, self._collate = samples, batch_size, collate

    def __len__(self) -> int:
        return len(self._samples) // self._batch_size

    def __getitem__(self, m: int) -> tuple[VideoBatch, list[BadSampleError]]:
        first = m % len(self) * self._batch_size
        numbers = range(first, first + self._batch_size)
        return self._collate([self._samples[n] for n in numbers]), []

    def check_world(self, world: int) -> None:
        """Any number of ranks: those that would run out of batches repeat the first ones."""

    def close(self) -> None:
        """Nothing is open: all frames are in memory."""


class HaystackSamples(Dataset):
    """Training samples by number."""

    def __init__(
        self,
        clips: list[UInt8[Tensor, "_t c h w"]],
        needles: list[Needle],
        plan: TrainingPlan,
        conversation: ConversationEncoder,
    ):
        self._clips, self._needles, self._plan = clips, needles, plan
        self._conversation = conversation
        self._by_question = _by_question(needles)

    def __len__(self) -> int:
        return self._plan.samples

    def __getitem__(self, n: int) -> Sample:
        rng = np.random.default_rng([self._plan.seed, n])
        length = int(rng.integers(*self._plan.range_at(n), endpoint=True))
        clip = self._clips[rng.integers(len(self._clips))]
        start = int(rng.integers(len(clip)))
        frames = clip[(start + torch.arange(length)) % len(clip)]  # t c h w, a copy
        most = min(self._plan.needles, length, len(self._by_question))
        count = int(rng.integers(1, most, endpoint=True))
        questions = rng.permutation(len(self._by_question))[:count]
        needles = [
            self._needles[rng.choice(list(self._by_question.values())[question])]
            for question in questions
        ]
        for place, needle in zip(rng.permutation(length)[:count], needles, strict=True):
            frames[place] = needle.frame
        return Sample(f"#{n}", self._conversation(_turns(needles)), [frames])


class NeedleGrid(Dataset):
    """Rows of the evaluation by number, in an order in which neighbours share most frames.

    Beside the plan's conditions there is `blind`, the haystack without any needle, and `ceiling`,
    the needle without any haystack: what a score says, it says between those two.

    Attributes:
        bank: every frame that any row shows, the haystack's first.
    """

    def __init__(
        self,
        clips: list[UInt8[Tensor, "_t c h w"]],
        needles: list[Needle],
        plan: GridPlan,
        encode: Callable[[Sequence[Needle], int], VideoBatch],
    ):
        self._plan, self._encode = plan, encode
        self._needles = _take_turns(needles, plan.needles)
        hay = torch.cat(clips)
        longest = max(plan.frames)
        if longest > len(hay):
            # Forth and back again: no frame is followed by one of another place in the film.
            there_and_back = torch.cat([torch.arange(len(hay)), torch.arange(len(hay)).flip(0)])
            hay = hay[there_and_back[torch.arange(longest) % len(there_and_back)]]
        self._hay = longest
        self.bank = torch.cat([hay[:longest], *(needle.frame[None] for needle in self._needles)])
        middle = min(plan.depths, key=lambda depth: abs(depth - 0.5))
        # Blind first: the first row with a needle in the middle is then compared with it.
        self._rows = [("ceiling", 1, 0.0)] + [("blind", frames, middle) for frames in plan.frames]
        self._rows += [
            (condition, frames, depth)
            for condition in plan.conditions
            for frames in plan.frames
            for depth in plan.depths
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> NeedleRow:
        condition, frames, depth = self._rows[i]
        order = torch.stack(
            [self._order(n, condition, frames, depth) for n in range(len(self._needles))]
        )
        text = self._encode(self._needles, frames)
        return NeedleRow(condition, frames, depth, list(range(len(self._needles))), order, text)

    def _order(self, needle: int, condition: str, frames: int, depth: float) -> Int[Tensor, " t"]:
        order = torch.arange(frames)
        place = round(depth * (frames - 1))
        if condition == "blind":
            return order
        distractors = self._plan.conditions.get(condition)
        if distractors is not None:
            rng = np.random.default_rng([self._plan.seed, needle, frames, place])
            question = self._needles[needle].question
            others = [n for n, o in enumerate(self._needles) if o.question != question]
            for at in distractors.places(place, frames, rng):
                order[at] = self._hay + int(rng.choice(others))
        order[place] = self._hay + needle
        return order


def read_clips(shards: str | Iterable[str], frames: FrameReader) -> list[UInt8[Tensor, "_t c h w"]]:
    """The videos of shards, in the order of the shards.

    Raises:
        BadSampleError: a sample that cannot be read, or one without a video.
    """
    clips = []
    for raw in _read_all(shards):
        with _named(raw):
            videos = [suffix for suffix in raw if is_video(suffix)]
            if not videos:
                raise BadSampleError("not_a_video", "a haystack needs one")
            clips += [frames.video(raw[suffix]) for suffix in videos]
    return clips


def read_needles(shards: str | Iterable[str], frames: FrameReader) -> list[Needle]:
    """The needles of shards: one image, one question and its answer each.

    Raises:
        BadSampleError: a sample that cannot be read, or is something else.
    """
    needles = []
    for raw in _read_all(shards):
        with _named(raw):
            turns, suffixes = parse_sample(raw)
            if [turn.role for turn in turns] != ["user", "assistant"] or len(suffixes) != 1:
                raise BadSampleError("not_a_needle", "one image, one question, one answer")
            picture = frames.image(raw[suffixes[0]])[0]
        question = turns[0].text.replace("<image>", "").strip()
        needles.append(Needle(picture, question, turns[1].text, raw["__key__"]))
    if len(_by_question(needles)) < 2:
        raise ValueError("needles of at least two questions are needed: they distract each other")
    return needles


def _read_all(shards: str | Iterable[str]) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(shards)
    for fault in manifest.faults:
        raise fault
    reader = ShardReader(manifest, timeout_s=30.0)
    try:
        for number, shard in enumerate(manifest.shards):
            for sample in range(shard.count):
                yield untar_sample(reader.read(number, sample), shard.url)
    finally:
        reader.close()


@contextmanager
def _named(raw: dict[str, Any]) -> Iterator[None]:
    """Says of a bad sample which one it is."""
    try:
        yield
    except BadSampleError as error:
        where = {"shard": raw["__url__"], "key": raw["__key__"]}
        raise BadSampleError(error.reason, error.detail, **where) from None


def _turns(needles: Sequence[Needle]) -> list[Turn]:
    """One question after the other about one video."""
    turns = []
    for number, needle in enumerate(needles):
        turns.append(Turn("user", needle.question if number else f"<video>\n{needle.question}"))
        turns.append(Turn("assistant", needle.answer))
    return turns


def _by_question(needles: Sequence[Needle]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, needle in enumerate(needles):
        groups.setdefault(needle.question, []).append(number)
    return groups


def _take_turns(needles: Sequence[Needle], count: int) -> list[Needle]:
    """`count` needles, one of each question in turn.

    Raises:
        ValueError: there are fewer.
    """
    groups = list(_by_question(needles).values())
    turns = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    if len(turns) < count:
        raise ValueError(f"data.grid.needles is {count}, but the shards hold {len(turns)} needles")
    return [needles[n] for n in turns[:count]]
