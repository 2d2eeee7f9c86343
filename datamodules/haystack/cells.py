"""The plan and the cells of a needle test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import VideoBatch
from datamodules.haystack.distractors import Distractors
from datamodules.haystack.needle import Needle, by_question

#: Conditions that every test measures in addition to those of its plan.
CANARIES = ("blind", "ceiling")


@dataclass(frozen=True)
class GridPlan:
    """The plan of an evaluation: conditions x lengths x depths x needles.

    Attributes:
        frames: lengths of the haystack in frames.
        depths: places of the needle, from 0 (first frame) to 1 (last frame).
        needles: number of needles, taken from each question in turn.
        conditions: name -> distractors around the needle; None: no distractors.
    """

    frames: Sequence[int]
    depths: Sequence[float]
    needles: int
    conditions: Mapping[str, Distractors | None] = field(default_factory=lambda: {"plain": None})
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.frames or min(self.frames) < 1:
            raise ValueError(f"data.grid.frames is {list(self.frames)}; name lengths of 1 or more")
        if not self.depths or not 0 <= min(self.depths) <= max(self.depths) <= 1:
            raise ValueError(f"data.grid.depths is {list(self.depths)}; name depths from 0 to 1")
        if self.needles < 1:
            raise ValueError(f"data.grid.needles is {self.needles}; set it to 1 or more")
        self._check_conditions()

    def _check_conditions(self) -> None:
        """Refuses bad conditions here, because the test itself runs only after the training."""
        if not self.conditions:
            raise ValueError("data.grid.conditions is empty; name one, such as {plain: null}")
        for name, distractors in self.conditions.items():
            key = f"data.grid.conditions.{name}"
            if name in CANARIES:
                raise ValueError(f"{key}: {name} is always measured; choose another name")
            if distractors is None:
                continue
            if not isinstance(distractors, Distractors):
                raise ValueError(f"{key} is {distractors!r}; set its _target_ to a Distractors")
            if self.needles < 2:
                raise ValueError(
                    f"data.grid.needles is 1, but {key} takes needles of other questions as "
                    "distractors; set 2 or more"
                )


@dataclass
class NeedleRow:
    """One cell: a condition, a length and a depth, with one row per needle.

    `order` holds the bank index of each frame. `text` is the batch without its real frames: it has
    the right number of placeholder frames, because the bank is encoded once for all cells.
    """

    condition: str
    frames: int
    depth: float
    needles: list[int]
    order: Int[Tensor, "b t"]
    text: VideoBatch


class NeedleGrid(Dataset):
    """The cells of an evaluation, by number. Neighbouring cells share most of their frames.

    In addition to the plan's conditions there are `blind`, the haystack without a needle, and
    `ceiling`, the needle without a haystack. A score is meaningful between these two bounds.

    Attributes:
        bank: all frames that any cell shows; the haystack comes first.
    """

    def __init__(
        self,
        clips: list[UInt8[Tensor, "_t c h w"]],
        needles: list[Needle],
        plan: GridPlan,
        encode: Callable[[Sequence[Needle], int], VideoBatch],
    ):
        self._plan, self._encode = plan, encode
        self._needles = take_turns(needles, plan.needles)
        hay = torch.cat(clips)
        longest = max(plan.frames)
        if longest > len(hay):
            # Repeat the haystack forwards and backwards, so neighbouring frames stay similar.
            there_and_back = torch.cat([torch.arange(len(hay)), torch.arange(len(hay)).flip(0)])
            hay = hay[there_and_back[torch.arange(longest) % len(there_and_back)]]
        self._hay = longest
        self.bank = torch.cat([hay[:longest], *(needle.frame[None] for needle in self._needles)])
        middle = min(plan.depths, key=lambda depth: abs(depth - 0.5))
        # Blind cells come first, so the first cell with a needle in the middle can be compared.
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
        text = self._encode(self._needles, frames)
        numbers = list(range(len(self._needles)))
        return NeedleRow(condition, frames, depth, numbers, self.orders(i), text)

    def orders(self, i: int) -> Int[Tensor, "b t"]:
        """Returns the bank index of each frame, for each needle of cell i."""
        return torch.stack([self._order(n, *self._rows[i]) for n in range(len(self._needles))])

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


def take_turns(needles: Sequence[Needle], count: int) -> list[Needle]:
    """Returns `count` needles, one from each question in turn.

    Raises:
        ValueError: there are fewer needles.
    """
    groups = list(by_question(needles).values())
    turns = [group[i] for i in range(max(map(len, groups))) for group in groups if i < len(group)]
    if len(turns) < count:
        raise ValueError(f"data.grid.needles is {count}, but the shards hold {len(turns)} needles")
    return [needles[n] for n in turns[:count]]
