"""Assigns samples to the rows that the LLM reads: one per row, or several packed into one row.

A packed sample is a document as `LanguageModel.forward` describes it: row 0 of the positions
restarts at 0 with each sample, and there is no mask. Without a mask, padding must be a document,
too.

The rotary positions restart with each sample, too. So a packed sample has the same positions as
alone, even if a scheme's positions are fractions. (Scalings whose frequencies depend on the length,
`dynamic` and `longrope`, use the longest sample of the batch, packed or not.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from datamodules.batch import IGNORE_INDEX


class Span(NamedTuple):
    """The place of a sample: columns `start` to `stop` (exclusive) of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """The spans of a batch's samples, in sample order, and the size of the rows that hold them."""

    spans: list[Span]
    rows: int
    width: int

    def spread(self, tokens: Shaped[Tensor, "n ..."], fill: int = 0) -> Shaped[Tensor, "b l ..."]:
        """Moves the concatenated tokens of all samples to their places in the rows."""
        place = tuple(numbers.to(tokens.device) for numbers in self._place)
        rows = tokens.new_full((self.rows, self.width, *tokens.shape[1:]), fill)
        return rows.index_put(place, tokens)  # not a view: FSDP's hooks would warn about one

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """Returns the row and the column of each token, one sample after the other."""
        lengths = torch.tensor([stop - start for _, start, stop in self.spans])
        row = torch.tensor([span.row for span in self.spans]).repeat_interleave(lengths)
        return row, torch.cat([torch.arange(start, stop) for _, start, stop in self.spans])

    def labels(self, labels: Int[Tensor, " n"]) -> tuple[Bool[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Returns the mask (False on padding) and the labels of the rows.

        The first token of a sample loses its label, because nothing before it predicts it.
        """
        mask = self.spread(torch.ones_like(labels, dtype=torch.bool))
        spread = self.spread(labels, fill=IGNORE_INDEX)
        for row, start, stop in self.spans:
            spread[row, start:stop][:1] = IGNORE_INDEX
        return mask, spread

    def positions(self, alone: Float[Tensor, "a1 n l"]) -> Float[Tensor, "a1 b l2"]:
        """Returns the positions of the rows, from those of each sample alone, padded on the right.

        In packed rows, padding is a document of its own.
        """
        by_sample = alone.movedim(0, -1)  # n l a1
        parts = [by_sample[i, : span.stop - span.start] for i, span in enumerate(self.spans)]
        positions = self.spread(torch.cat(parts)).movedim(-1, 0)  # a1 b l2
        return self.restart(positions) if len(self.spans) > self.rows else positions

    def restart(self, positions: Float[Tensor, "a1 b l"]) -> Float[Tensor, "a1 b l"]:
        """Turns the padding at the end of rows into documents, none longer than a sample."""
        ends = [0] * self.rows
        for span in self.spans:
            ends[span.row] = max(ends[span.row], span.stop)
        longest = max(1, *(span.stop - span.start for span in self.spans))
        behind = torch.arange(self.width) - torch.tensor(ends)[:, None]  # b l
        count = torch.where(behind < 0, positions[0], (behind % longest).float())
        return torch.cat([count[None], positions[1:]])


def one_a_row(lengths: Sequence[int], padding_side: str = "right") -> Placement:
    """Places sample i in row i."""
    width = max(lengths)
    shifts = [width - n if padding_side == "left" else 0 for n in lengths]
    spans = [Span(row, at, at + n) for row, (at, n) in enumerate(zip(shifts, lengths, strict=True))]
    return Placement(spans, len(spans), width)


def pack(lengths: Sequence[int], max_length: int) -> Placement:
    """Packs samples into rows of at most `max_length` tokens: first fit, longest sample first.

    If a sample is longer than that, its length becomes the limit for all rows, because all rows
    have the same width.
    """
    capacity = max(max_length, *lengths)
    used: list[int] = []  # tokens of each row
    spans: list[Span] = [Span(0, 0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[sample]
        row = next((r for r, n in enumerate(used) if n + length <= capacity), len(used))
        if row == len(used):
            used.append(0)
        spans[sample] = Span(row, used[row], used[row] + length)
        used[row] += length
    return Placement(spans, len(used), max(used))
