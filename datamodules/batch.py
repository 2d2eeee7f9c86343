"""The batches that a datamodule yields and a model takes.

All signatures of the project use the same axis letters:

    b  samples of a batch               d  width of the current component
    l  tokens of a padded row           e  width of CLIP's joint image-text space
    v  visuals (videos and images)      m  width of the LLM
    n  frames of all visuals, in order  k  tokens of a padded guide prompt
    c  colour channels                  p  patches of one frame, row by row
    t  time steps of a visual           h, w  rows and columns of pixels, patches or tokens
    a  axes of rotary positions         f  rotary frequencies (half the width of a head)
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

#: Label of a token without loss. `torch.nn.functional.cross_entropy` ignores it by default.
IGNORE_INDEX = -100

#: Placeholder in `input_ids` for one whole visual, like LLaVA's IMAGE_TOKEN_INDEX. The model
#: replaces it with the tokens that the pooler returns, so the data does not depend on the pooler.
VISUAL_SLOT = -200

_FILL = {"labels": IGNORE_INDEX}  # padding value by field; 0 for all others


class Grid(NamedTuple):
    """The time steps, rows and columns of one visual, in patches or tokens. An image has t = 1."""

    t: int
    h: int
    w: int

    @property
    def size(self) -> int:
        return self.t * self.h * self.w


class Tiles(NamedTuple):
    """The layout of an image that was cut into tiles: the tile grid and the picture size in pixels.

    The picture keeps its aspect ratio. It is centred in the grid and as large as fits.
    """

    rows: int
    columns: int
    height: int
    width: int


class VisualInfo(NamedTuple):
    """Facts about a visual besides its pixels. There are no tensors, so nothing is ever cast."""

    seconds: tuple[float, ...] | None = None  # when each frame of a video is shown; images: None
    #: Its frames are a thumbnail, then the tiles row by row. None: it was not cut.
    tiles: Tiles | None = None
    #: A random number in [0, 1) for rotary schemes with random settings; None in evaluation.
    draw: float | None = None
    #: It continues the visual before it: one video with text between its parts.
    continues: bool = False


@dataclass
class Visual:
    """One image or one video. Each visual has its own size."""

    frames: Num[Tensor, "t c h w"]  # uint8 RGB; floats must already be normalised
    info: VisualInfo = VisualInfo()  # noqa: RUF009 - it cannot change


class Task(NamedTuple):
    """The question of a held-out sample, with its correct answers."""

    answers: tuple[str, ...]  # each one is correct; a letter with `options`, yes or no in a pair
    options: tuple[str, ...] = ()  # choices of a multiple-choice question, lettered A, B, ...
    option_ids: tuple[int, ...] = ()  # first token of the answer, for each option's letter
    pair: str = ""  # name of a group of questions that are scored together
    hallucinated: bool = False  # in a pair: this question asks about something not in the video
    category: str = ""  # kind of question; a report shows each kind by itself
    group: str = ""  # samples whose answers depend on one another, such as those about one video


@dataclass
class VideoBatch:
    """Samples padded on the right. A sample has any number of visuals, of any size.

    The pixels of all visuals lie one after the other in one tensor, because workers and GPUs move
    one large tensor much faster than many small ones. `visuals` returns them as views of it.
    """

    input_ids: Int[Tensor, "b l"]  # one VISUAL_SLOT for each visual of the row
    attention_mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # IGNORE_INDEX outside the answers
    pixels: Num[Tensor, " pixels"]  # of all visuals, in the order of the slots, row by row
    shapes: list[tuple[int, int, int, int]]  # (t, c, h, w) of each visual
    infos: list[VisualInfo]  # of each visual
    prompt_ids: Int[Tensor, "b k"]  # the question, tokenized for the encoder's text tower
    prompt_mask: Bool[Tensor, "b k"]
    keys: list[str]  # origin of each sample, for logs
    tasks: list[Task | None] = field(default_factory=list)  # one per row; empty: no row has one

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __post_init__(self) -> None:
        slots = int((self.input_ids == VISUAL_SLOT).sum())
        if not slots == len(self.shapes) == len(self.infos):
            raise ValueError(
                f"the text has {slots} visual slots, but there are {len(self.shapes)} visuals"
            )
        needed = sum(map(math.prod, self.shapes))
        if needed != len(self.pixels):
            raise ValueError(f"the visuals need {needed} pixels, but {len(self.pixels)} are given")
        for (frames, *_), info in zip(self.shapes, self.infos, strict=True):
            tiles = info.tiles
            if tiles and frames != 1 + tiles.rows * tiles.columns:
                raise ValueError(
                    f"an image of {tiles.rows} x {tiles.columns} tiles and a thumbnail has "
                    f"{1 + tiles.rows * tiles.columns} frames, but {frames} are given"
                )
        self.tasks = self.tasks or [None] * len(self)
        if len(self.tasks) != len(self):
            raise ValueError(f"{len(self.tasks)} tasks for {len(self)} rows")

    @property
    def visuals(self) -> list[Visual]:
        """The visuals, in the order of the slots, row by row. Their frames are views."""
        parts = self.pixels.split([math.prod(shape) for shape in self.shapes])
        return [
            Visual(part.view(shape), info)
            for part, shape, info in zip(parts, self.shapes, self.infos, strict=True)
        ]

    def to(self, device: torch.device | str) -> "VideoBatch":
        """Returns the batch on `device`."""
        return _to(self, torch.device(device))

    def first(self, count: int) -> "VideoBatch":
        """Returns the first `count` rows with their visuals."""
        return self.select(range(count))

    def select(self, rows: Sequence[int]) -> "VideoBatch":
        """Returns these rows with their visuals, in the order of the batch."""
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
        """Returns each row up to its first label, where the model generates an answer.

        Drops visuals after that point.
        """
        mask = self.attention_mask & ((self.labels != IGNORE_INDEX).cumsum(1) == 0)
        return replace(
            self,
            input_ids=torch.where(mask, self.input_ids, 0),
            attention_mask=mask,
            labels=torch.full_like(self.labels, IGNORE_INDEX),
            **self._visuals_where(mask[self.input_ids == VISUAL_SLOT].tolist()),
        )

    def without_visuals(self) -> "VideoBatch":
        """Returns the rows as plain text: without visuals and without their slots."""
        kept = self.attention_mask & (self.input_ids != VISUAL_SLOT)
        places = (~kept).int().argsort(dim=1, stable=True)  # the kept tokens first, in their order
        places = places[:, : int(kept.sum(1).max())]
        return replace(
            self,
            input_ids=torch.where(kept, self.input_ids, 0).gather(1, places),
            attention_mask=kept.gather(1, places),
            labels=torch.where(kept, self.labels, IGNORE_INDEX).gather(1, places),
            **visual_fields([], self.pixels[:0]),
        )

    def _visuals_where(self, kept: Sequence[bool]) -> dict[str, Any]:
        """Returns the visual fields (`pixels`, `shapes`, `infos`) of the kept visuals."""
        visuals = [visual for visual, keep in zip(self.visuals, kept, strict=True) if keep]
        return visual_fields(visuals, self.pixels[:0])

    def answers(self) -> list[list[int]]:
        """Returns the labelled tokens of each row."""
        return [row[row != IGNORE_INDEX].tolist() for row in self.labels]


def visual_fields(visuals: Sequence[Visual], none: Tensor | None = None) -> dict[str, Any]:
    """Returns the fields of a `VideoBatch` that hold these visuals.

    The pixels of a single visual are not copied: an hour of video fits into memory only once.

    Args:
        none: the pixels of no visuals; by default uint8 on the CPU.
    """
    none = torch.zeros(0, dtype=torch.uint8) if none is None else none
    if len({visual.frames.dtype for visual in visuals}) > 1:
        raise ValueError("visuals of a batch must have one dtype: uint8, or normalised floats")
    parts = [visual.frames.flatten() for visual in visuals]
    return {
        "pixels": parts[0] if len(parts) == 1 else torch.cat([none, *parts]),
        "shapes": [tuple(visual.frames.shape) for visual in visuals],
        "infos": [visual.info for visual in visuals],
    }


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "b l"]:
    """Stacks rows of different lengths, padded on the right with `value`."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


@dataclass
class PreferenceBatch:
    """Pairs of answers to the same questions about the same visuals. `chosen` is the better one."""

    chosen: VideoBatch
    rejected: VideoBatch  # shares the tensor `pixels` with `chosen`
    reference: Float[Tensor, "b 2"] | None = None  # log-probs of chosen and rejected, if known
    #: For each row, the settings that its reference was computed with: digest by name, if known.
    settings: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.chosen)

    def __post_init__(self) -> None:
        if len(self.chosen) != len(self.rejected):
            raise ValueError(
                f"{len(self.chosen)} chosen answers, but {len(self.rejected)} rejected answers"
            )

    @property
    def keys(self) -> list[str]:
        return self.chosen.keys

    def first(self, count: int) -> VideoBatch:
        """Returns the first `count` rows with the chosen answers."""
        return self.chosen.first(count)

    def both(self) -> VideoBatch:
        """Returns 2 b rows: the chosen answers, then the rejected ones. Visuals appear twice."""
        joined = {
            f.name: _join(getattr(self.chosen, f.name), getattr(self.rejected, f.name), f.name)
            for f in fields(VideoBatch)
        }
        return VideoBatch(**joined)

    def to(self, device: torch.device) -> "PreferenceBatch":
        """Returns the batch on `device`. The shared pixels are copied once."""
        chosen = _to(self.chosen, device)
        rejected = _to(self.rejected, device, pixels=chosen.pixels)
        reference = None if self.reference is None else self.reference.to(device)
        return replace(self, chosen=chosen, rejected=rejected, reference=reference)


def _to(batch: VideoBatch, device: torch.device, **known: Any) -> VideoBatch:
    moved = copy(batch)  # no new object: the checks of __post_init__ would wait for the device
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name not in known:
            known[name] = value.to(device, non_blocking=device.type == "cuda")
    vars(moved).update(known)
    return moved


def _join(first: Any, second: Any, name: str) -> Any:
    """Stacks one field of two batches, padding rows on the right to the same width."""
    if not isinstance(first, Tensor):
        return first + second
    if name == "pixels":
        return torch.cat([first, second])
    width = max(first.shape[1], second.shape[1])
    joined = first.new_full((len(first) + len(second), width), _FILL.get(name, 0))
    joined[: len(first), : first.shape[1]] = first
    joined[len(first) :, : second.shape[1]] = second
    return joined


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Returns (data rank, number of data ranks).

    Ranks of one tensor-parallel group share a data rank, so they read the same micro-batches.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        shared = strategy.distributed_sampler_kwargs
        return shared["rank"], shared["num_replicas"]
    return trainer.global_rank, trainer.world_size
