"""The contract between the two halves: what a datamodule yields and a model takes.

Axis letters, the same in every signature of the project:

    b  samples of a batch               d  width of the stage at hand
    l  tokens of a padded row           e  width of the space that CLIP's image and text share
    v  visuals (videos and images)      m  width of the LLM
    n  frames of all visuals, in turn   k  tokens of a padded guide prompt
    c  colour channels                  p  patches of one frame, row by row
    t  time steps of a visual           h, w  rows and columns of pixels, patches or tokens
    f  rotary frequencies (half the width of an attention head)
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

#: Label of a token that is not learnt, as `torch.nn.functional.cross_entropy` ignores it.
IGNORE_INDEX = -100

#: Stands in `input_ids` for one whole visual, as LLaVA's IMAGE_TOKEN_INDEX does. The model puts
#: as many tokens in its place as the pooler leaves, so data never depends on the pooler.
VISUAL_SLOT = -200

_FILL = {"labels": IGNORE_INDEX}  # of rows that become wider


class Grid(NamedTuple):
    """Time steps, rows and columns of one visual, in patches or in tokens. An image has t = 1."""

    t: int
    h: int
    w: int

    @property
    def size(self) -> int:
        return self.t * self.h * self.w


class Tiles(NamedTuple):
    """How an image was cut: a grid of frames, and the pixels of the picture that they hold.

    The picture stands in the middle of the grid in its own aspect ratio, as large as fits.
    """

    rows: int
    columns: int
    height: int
    width: int


class Task(NamedTuple):
    """What is known of the question that a held-out sample asks."""

    answers: tuple[str, ...]  # any of them is right; with options a letter, in a pair yes or no
    options: tuple[str, ...] = ()  # of a multiple choice, lettered A, B, ... in this order
    option_ids: tuple[int, ...] = ()  # the token with which an answer of that letter begins
    pair: str = ""  # names the questions that count only together
    hallucinated: bool = False  # of a pair: this one asks after what the video does not show


@dataclass
class VideoBatch:
    """Samples padded on the right. Visuals of any length, several or none in a sample."""

    input_ids: Int[Tensor, "b l"]  # VISUAL_SLOT once for every visual of the row
    attention_mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # IGNORE_INDEX outside the answers
    frames: Num[Tensor, "n c h w"]  # uint8 RGB; floats are taken as normalised already
    frame_counts: list[int]  # frames of each visual, in the order of their slots, row by row
    prompt_ids: Int[Tensor, "b k"]  # the question as the encoder's text tower reads it
    prompt_mask: Bool[Tensor, "b k"]
    keys: list[str]  # where each sample comes from, for logs
    #: Of each visual: None, or how its frames are cut out of one image: a thumbnail, then tiles
    #: row by row. Empty: no visual is.
    tiles: list[Tiles | None] = field(default_factory=list)
    tasks: list[Task | None] = field(default_factory=list)  # of each row; empty: nothing is known

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __post_init__(self) -> None:
        slots = int((self.input_ids == VISUAL_SLOT).sum())
        if slots != len(self.frame_counts):
            raise ValueError(
                f"{slots} visual slots in the text, but {len(self.frame_counts)} visuals"
            )
        if sum(self.frame_counts) != self.frames.shape[0]:
            raise ValueError(
                f"the visuals count {sum(self.frame_counts)} frames, "
                f"{self.frames.shape[0]} are given"
            )
        self.tiles = self.tiles or [None] * slots
        for frames, tiles in zip(self.frame_counts, self.tiles, strict=True):
            if tiles and frames != 1 + tiles.rows * tiles.columns:
                raise ValueError(
                    f"an image of {tiles.rows} x {tiles.columns} tiles and a thumbnail has "
                    f"{1 + tiles.rows * tiles.columns} frames, {frames} are given"
                )
        self.tasks = self.tasks or [None] * len(self)
        if len(self.tasks) != len(self):
            raise ValueError(f"{len(self.tasks)} tasks for {len(self)} rows")

    @property
    def clips(self) -> list[int]:
        """`frame_counts` as an encoder takes them: a tile has no neighbours in time."""
        counts = zip(self.frame_counts, self.tiles, strict=True)
        return [n for frames, tiles in counts for n in ([1] * frames if tiles else [frames])]

    def first(self, count: int) -> "VideoBatch":
        """The first rows, with their visuals."""
        return self.select(range(count))

    def select(self, rows: Sequence[int]) -> "VideoBatch":
        """These rows in the order of the batch, with their visuals."""
        taken = [row in rows for row in range(len(self))]
        index = torch.tensor(taken, device=self.input_ids.device)
        owners = (self.input_ids == VISUAL_SLOT).nonzero()[:, 0].tolist()
        tensors = ("input_ids", "attention_mask", "labels", "prompt_ids", "prompt_mask")
        return replace(
            self,
            **{name: getattr(self, name)[index] for name in tensors},
            keys=[key for key, take in zip(self.keys, taken, strict=True) if take],
            tasks=[task for task, take in zip(self.tasks, taken, strict=True) if take],
            **self._visuals_where([taken[row] for row in owners]),
        )

    def questions(self) -> "VideoBatch":
        """What stands before the first label of each row: there an answer is generated.

        Visuals behind it are left out.
        """
        mask = self.attention_mask & ((self.labels != IGNORE_INDEX).cumsum(1) == 0)
        return replace(
            self,
            input_ids=torch.where(mask, self.input_ids, 0),
            attention_mask=mask,
            labels=torch.full_like(self.labels, IGNORE_INDEX),
            **self._visuals_where(mask[self.input_ids == VISUAL_SLOT].tolist()),
        )

    def _visuals_where(self, kept: Sequence[bool]) -> dict[str, Any]:
        """The fields that hold visuals, of some of them."""
        visuals = zip(self.frames.split(self.frame_counts), kept, strict=True)
        return {
            "frames": torch.cat([self.frames[:0], *(frames for frames, keep in visuals if keep)]),
            "frame_counts": [n for n, keep in zip(self.frame_counts, kept, strict=True) if keep],
            "tiles": [t for t, keep in zip(self.tiles, kept, strict=True) if keep],
        }

    def answers(self) -> list[list[int]]:
        """The labelled tokens of each row."""
        return [row[row != IGNORE_INDEX].tolist() for row in self.labels]


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "b l"]:
    """Stacks rows of different lengths, padded on the right with `value`."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


@dataclass
class PreferenceBatch:
    """Pairs of answers to the same questions about the same visuals, the better one `chosen`."""

    chosen: VideoBatch
    rejected: VideoBatch  # the same `frames`, not a copy of them
    reference: Float[Tensor, "b 2"] | None = None  # log-probs of chosen, rejected, where known
    #: What each row's reference was made with: digest by name, where known.
    settings: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.chosen)

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.rejected):
            raise ValueError(f"{len(self.chosen)} chosen answers, {len(self.rejected)} rejected")

    @property
    def keys(self) -> list[str]:
        return self.chosen.keys

    def first(self, count: int) -> VideoBatch:
        """The first rows with the answers that were chosen."""
        return self.chosen.first(count)

    def both(self) -> VideoBatch:
        """2 b rows: the chosen answers, then the rejected ones; the visuals stand there twice."""
        joined = {
            f.name: _join(getattr(self.chosen, f.name), getattr(self.rejected, f.name), f.name)
            for f in fields(VideoBatch)
        }
        return VideoBatch(**joined)

    def to(self, device: torch.device) -> "PreferenceBatch":
        """On `device`, where frames go once."""
        chosen = _to(self.chosen, device)
        rejected = _to(self.rejected, device, frames=chosen.frames)
        reference = None if self.reference is None else self.reference.to(device)
        return replace(self, chosen=chosen, rejected=rejected, reference=reference)


def _to(batch: VideoBatch, device: torch.device, **known: Any) -> VideoBatch:
    moved = copy(batch)  # not made anew: to check it would wait for the device
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name not in known:
            known[name] = value.to(device, non_blocking=device.type == "cuda")
    vars(moved).update(known)
    return moved


def _join(first: Any, second: Any, name: str) -> Any:
    """One field of two batches: rows below rows, padded on the right to the same width."""
    if not isinstance(first, Tensor):
        return first + second
    if name == "frames":
        return torch.cat([first, second])
    width = max(first.shape[1], second.shape[1])
    joined = first.new_full((len(first) + len(second), width), _FILL.get(name, 0))
    joined[: len(first), : first.shape[1]] = first
    joined[len(first) :, : second.shape[1]] = second
    return joined


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Which of how many shares of the micro-batches this process reads.

    Those of a rank, but where ranks split the layers of a model among them: these read the same.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        shared = strategy.distributed_sampler_kwargs
        return shared["rank"], shared["num_replicas"]
    return trainer.global_rank, trainer.world_size
