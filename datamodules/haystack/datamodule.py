"""V-NIAH and V-NIAH-D: a needle image among the frames of a real video, and a question about it.

    haystack shards  k.mp4 k.json        needle shards  k.jpg k.json (one question, one answer)
          |  frames.py                         |  frames.py, conversation.py
          v                                    v
    clips, uint8 (t c h w)               needles: frame (c h w), question, answer
          |                                    |
          +---------------+--------------------+
                          |
          +---------------+--------------------+
          v training                           v evaluation
    a part of one clip with              one cell = a condition, a length, a depth:
    several needles, a question          the same haystack with each needle in turn,
    about each: VideoBatch               with distractors around it: NeedleRow

Needles with different questions are distractors for each other. V-NIAH: LongVA, arXiv 2406.16852;
V-NIAH-D: VideoRoPE, arXiv 2502.05173, section 4.3.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.base import StepsDataModule
from datamodules.batch import VideoBatch, Visual, VisualInfo, data_rank
from datamodules.common.digest import digest
from datamodules.errors import BadSampleError
from datamodules.haystack.cells import GridPlan, NeedleGrid
from datamodules.haystack.needle import Needle, by_question, read_clips, read_needles, turns_about
from datamodules.instruct import Sample, collater
from datamodules.sample.conversation import ConversationEncoder
from datamodules.sample.draw import with_draws
from datamodules.sample.outline import Outline
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import Faults, StreamLoader
from datamodules.stream.order import check_ranks
from datamodules.visuals.frames import FrameReader

SPLITS = ("train", "test")

_VAL_SAMPLES, _VAL_SEED = 64, 2**31


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of training samples.

    Attributes:
        samples: samples of the whole training, over all ranks.
        frames: minimum and maximum frames of a sample, including needles.
        needles: maximum needles per sample; each is a distractor for the other questions.
        first_frames: the range at the start of training. It grows to `frames` over the first
            `growth` (a fraction) of the samples. Short videos are cheap, and they teach the model
            to read a needle before it must find one.
    """

    samples: int
    frames: Sequence[int]
    needles: int = 5
    first_frames: Sequence[int] = (3, 8)
    growth: float = 0.5

    def __post_init__(self) -> None:
        for name in ("frames", "first_frames"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"data.training.{name} is [{low}, {high}]; set 1 <= low <= high")
        for name in ("samples", "needles"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.training.{name} is {getattr(self, name)}; set 1 or more")

    def range_at(self, n: int) -> tuple[int, int]:
        """Returns the minimum and maximum frames of sample n."""
        done = min(1.0, n / max(1.0, self.growth * self.samples))
        low, high = (
            round(a + done * (b - a)) for a, b in zip(self.first_frames, self.frames, strict=True)
        )
        return low, high


@dataclass(frozen=True)
class HaystackOptions:
    """Says how samples are drawn and loaded. The keys are those of `StreamOptions`.

    Attributes:
        seed: the n-th sample is a function of the seed and n alone.
        num_workers: processes that draw samples for a rank; 0: the training draws them itself.
        on_changed: `stop` refuses a checkpoint of other shards or another plan, `go_on` takes it.
    """

    seed: int = 0
    num_workers: int = 0
    on_changed: str = "stop"


class HaystackDataModule(StepsDataModule):
    """Builds haystacks for training and the cells of an evaluation from shards.

    Args:
        shards: `haystack`: video shards by split, `train` and `test`; `needles`: needle image
            shards by split.
        frames: the reader of visuals; its sampler chooses the frames of a video for the haystack.
        conversation: makes the text encoder; a partial, so that the tokenizer is loaded only with
            the first data.
        training, grid: the plans of training and evaluation.
        stream: how training samples are drawn and loaded.
        batch_size, global_batch_size, audit: as in `StepsDataModule`.
    """

    def __init__(
        self,
        shards: Mapping[str, Mapping[str, str | Iterable[str]]],
        frames: FrameReader,
        conversation: Callable[[], ConversationEncoder],
        training: TrainingPlan,
        grid: GridPlan,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        audit: bool = False,
        stream: HaystackOptions | None = None,
    ):
        self._options = stream or HaystackOptions()
        key = "data.stream.on_changed"
        super().__init__(batch_size, global_batch_size, audit, self._options.on_changed, key)
        self._shards, self._fingerprint = shards, ""
        self._frames, self._make_conversation = frames, conversation
        self.training, self.grid = training, grid
        self.faults = {"train": Faults("raise")}
        self._sets: dict[str, tuple[list[Tensor], list[Needle]]] = {}

    def prepare_data(self) -> None:
        """Makes missing indexes once per node, before the ranks of the node read them.

        Raises:
            BadSampleError: a shard is missing or damaged.
        """
        for shards in self._shards.values():
            for split in SPLITS:
                if faults := read_manifest(shards[split]).faults:
                    raise faults[0]

    def setup(self, stage: str | None = None) -> None:
        if self._sets:
            return
        for split in SPLITS:
            clips = read_clips(self._shards["haystack"][split], self._frames)
            needles = read_needles(self._shards["needles"][split], self._frames)
            _check_sizes(clips, needles)
            self._sets[split] = clips, needles
        self._grid = NeedleGrid(*self._sets["test"], self.grid, self._encode)

    def fingerprint(self) -> str:
        if not self._fingerprint:
            data = self._digest("train")
            words = asdict(self.training) | {"seed": self._options.seed}
            plan = " ".join(f"{name} {words[name]}".replace(", ", ",") for name in words)
            self._fingerprint = f"data {data} {plan} batch {self.batch_size} step {self.per_step}"
        return self._fingerprint

    def validation_fingerprint(self) -> str:
        return self._digest("test")

    def _digest(self, split: str) -> str:
        shards = [of_split[split] for of_split in self._shards.values()]
        return digest(*(read_manifest(each).fingerprint() for each in shards))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.conversation.tokenizer

    @property
    def bank(self) -> UInt8[Tensor, "n c h w"]:
        """The frames that `NeedleRow.order` indexes."""
        return self._grid.bank

    def train_dataloader(self) -> StreamLoader:
        options = self._options
        loader = self._loader(
            "train",
            self.training,
            options.seed,
            self.per_step,
            num_workers=options.num_workers,
            position=self._position,
        )
        self._end_in_steps(len(loader.order), loader.world)
        return loader

    def val_dataloader(self) -> StreamLoader:
        """Returns unseen videos of the training lengths, with one question about each."""
        plan = replace(self.training, samples=_VAL_SAMPLES, needles=1, growth=0.0)
        return self._loader("test", plan, _VAL_SEED)

    @cached_property
    def conversation(self) -> ConversationEncoder:
        return self._make_conversation()

    def outlined(self, outline: Outline) -> VideoBatch:
        text = self.conversation.outlined(outline)
        sample = Sample("outline", text, list(outline.visuals))
        return self._collate([sample] * self.batch_size)

    def test_dataloader(self) -> "NeedleGrid":
        """Returns the cells. Every rank reads all of them.

        It is not a DataLoader, because Lightning would split one among the ranks.
        """
        return self._grid

    def _encode(self, needles: Sequence[Needle], frames: int) -> VideoBatch:
        """Returns a batch with one question per row, about a video of placeholder frames."""
        stand_in = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        texts = [
            Sample(
                needle.key,
                self.conversation(turns_about([needle])),
                [video(stand_in.expand(frames, -1, -1, -1))],
            )
            for needle in needles
        ]
        return self._collate(texts)

    def _collate(self, samples: list[Sample]) -> VideoBatch:
        return collater(self.conversation)(samples)

    def _loader(
        self, split: str, plan: TrainingPlan, seed: int, per_step: int | None = None, **how: Any
    ) -> StreamLoader:
        samples = HaystackSamples(
            *self._sets[split], plan, self.conversation, seed, drawn=split == "train"
        )
        stream = HaystackStream(samples, self.batch_size, self._collate, per_step)
        rank, world = data_rank(self.trainer) if self.trainer else (0, 1)
        return StreamLoader(
            lambda epoch: stream, stream, Faults("raise"), rank=rank, world=world, **how
        )


def _check_sizes(clips: Sequence[Tensor], needles: Sequence[Needle]) -> None:
    """Refuses frames of several sizes. A needle lies among the frames of a haystack.

    Raises:
        ValueError: the sizes differ.
    """
    shapes = [clip.shape[-2:] for clip in clips] + [needle.frame.shape[-2:] for needle in needles]
    sizes = [f"{height} x {width}" for height, width in dict.fromkeys(map(tuple, shapes))]
    if len(sizes) > 1:
        raise ValueError(
            f"the frames of a needle test must have one size, but some have {sizes[0]} pixels and "
            f"others {sizes[1]}: choose data/frames=fixed, square, pad or crop"
        )


class HaystackStream(Dataset):
    """The micro-batches of all ranks, by number m, with the samples in order.

    Args:
        per_step: micro-batches per optimizer step; those that do not fill the last step are left
            out. `None`: there are no steps, and any number of ranks is allowed.
    """

    def __init__(
        self,
        samples: "HaystackSamples",
        batch_size: int,
        collate: Callable[[list[Sample]], VideoBatch],
        per_step: int | None = None,
    ):
        self._samples, self._batch_size, self._collate = samples, batch_size, collate
        self._per_step = per_step
        if not len(self):
            needed = batch_size * (per_step or 1)
            raise ValueError(
                f"data.training.samples is {len(samples)}, fewer than the {needed} of one "
                "optimizer step; set more, or a smaller data.global_batch_size"
            )

    def __len__(self) -> int:
        per_step = self._per_step or 1
        return len(self._samples) // self._batch_size // per_step * per_step

    def __getitem__(self, m: int) -> tuple[VideoBatch, list[BadSampleError]]:
        first = m % len(self) * self._batch_size
        numbers = range(first, first + self._batch_size)
        return self._collate([self._samples[n] for n in numbers]), []

    def check_world(self, world: int) -> None:
        """Checks the number of ranks. Without steps, a rank that runs out repeats the first ones.

        Raises:
            ValueError: `world` ranks cannot share the micro-batches of an optimizer step.
        """
        if self._per_step is not None:
            check_ranks(self._per_step, world)

    def close(self) -> None:
        """Does nothing: all frames are in memory."""


class HaystackSamples(Dataset):
    """Training samples by number.

    Args:
        drawn: each video has a `draw`.
    """

    def __init__(
        self,
        clips: list[UInt8[Tensor, "_t c h w"]],
        needles: list[Needle],
        plan: TrainingPlan,
        conversation: ConversationEncoder,
        seed: int,
        drawn: bool = False,
    ):
        self._clips, self._needles, self._plan = clips, needles, plan
        self._conversation, self._seed, self._drawn = conversation, seed, drawn
        self._by_question = by_question(needles)

    def __len__(self) -> int:
        return self._plan.samples

    def __getitem__(self, n: int) -> Sample:
        rng = np.random.default_rng([self._seed, n])
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
        visuals = [video(frames)]
        if self._drawn:
            visuals = with_draws(visuals, self._seed, n)
        return Sample(f"#{n}", self._conversation(turns_about(needles)), visuals)


def video(frames: UInt8[Tensor, "t c h w"]) -> Visual:
    """Returns a video of one frame per second, as V-NIAH samples its haystack."""
    return Visual(frames, VisualInfo(tuple(map(float, range(len(frames))))))
