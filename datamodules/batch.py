"""The batches that a datamodule yields and a model takes.

All signatures of the project use the same axis letters:

    b  samples of a batch               d  width of the current component
    l  tokens of a padded row           e  width of CLIP's joint image-text space
    v  visuals (videos and images)      m  width of the LLM
    n  frames of all visuals, in order  k  tokens of a padded guide prompt
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


class Task(NamedTuple):
    """The question of a held-out sample, with its correct answers."""

    answers: tuple[str, ...]  # each one is correct; a letter with `options`, yes or no in a pair
    options: tuple[str, ...] = ()  # choices of a multiple-choice question, lettered A, B, ...
    option_ids: tuple[int, ...] = ()  # first token of the answer, for each option's letter
    pair: str = ""  # name of a group of questions that are scored together
    hallucinated: bool = False  # in a pair: this question asks about something not in the video


@dataclass
class VideoBatch:
    """Samples padded on the right. A sample has any number of visuals, of any length."""

    input_ids: Int[Tensor, "b l"]  # one VISUAL_SLOT for each visual of the row
    attention_mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # IGNORE_INDEX outside the answers
    frames: Num[Tensor, "n c h w"]  # uint8 RGB; floats must already be normalised
    frame_counts: list[int]  # frames of each visual, in the order of the slots, row by row
    prompt_ids: Int[Tensor, "b k"]  # the question, tokenized for the encoder's text tower
    prompt_mask: Bool[Tensor, "b k"]
    keys: list[str]  # origin of each sample, for logs
    #: One entry per visual. Tiles: its frames are a thumbnail, then the tiles row by row. None:
    #: it was not cut. An empty list means that no visual was cut.
    tiles: list[Tiles | None] = field(default_factory=list)
    tasks: list[Task | None] = field(default_factory=list)  # one per row; empty: no row has one

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
        """Returns `frame_counts` for an encoder: each tile is a clip of one frame."""
        counts = zip(self.frame_counts, self.tiles, strict=True)
        return [n for frames, tiles in counts for n in ([1] * frames if tiles else [frames])]

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

    def _visuals_where(self, kept: Sequence[bool]) -> dict[str, Any]:
        """Returns the visual fields (`frames`, `frame_counts`, `tiles`) of the kept visuals."""
        visuals = zip(self.frames.split(self.frame_counts), kept, strict=True)
        return {
            "frames": torch.cat([self.frames[:0], *(frames for frames, keep in visuals if keep)]),
            "frame_counts": [n for n, keep in zip(self.frame_counts, kept, strict=True) if keep],
            "tiles": [t for t, keep in zip(self.tiles, kept, strict=True) if keep],
        }

    def answers(self) -> list[list[int]]:
        """Returns the labelled tokens of each row."""
        return [row[row != IGNORE_INDEX].tolist() for row in self.labels]


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "b l"]:
    """Stacks rows of different lengths, padded on the right with `value`."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)


@dataclass
class PreferenceBatch:
    """Pairs of answers to the same questions about the same visuals. `chosen` is the better one."""

    chosen: VideoBatch
    rejected: VideoBatch  # shares the tensor `frames` with `chosen`
    reference: Float[Tensor, "b 2"] | None = None  # log-probs of chosen and rejected, if known
    #: For each row, the settings that its reference was computed with: digest by name, if known.
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
        """Returns the batch on `device`. The shared frames are copied once."""
        chosen = _to(self.chosen, device)
        rejected = _to(self.rejected, device, frames=chosen.frames)
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
    if name == "frames":
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
