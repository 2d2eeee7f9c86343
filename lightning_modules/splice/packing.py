"""Where samples lie in the rows that the LLM reads: one a row, or several that do not meet.

Samples of one row are kept apart by their positions alone: row 0 of the positions restarts at 0
with each, and no mask is given. What transformers 5.23 makes of that:

- sdpa, eager, flex: without mask and cache it takes every step of row 0 other than +1 for the
  start of another document, in each row of the batch by itself, and lets none see another. With
  a mask it looks for none, so there must be none, and padding has to be a document too.
- flash: the kernels see documents only where they are told the lengths, which transformers reads
  out of the positions for a batch of one row alone. `CausalLM` tells them, for any number of rows.

The rotary positions restart with each sample as well, so a packed sample has the numbers that it
has alone, also where a scheme's positions are fractions. (Scalings whose frequencies depend on the
length, `dynamic` and `longrope`, read the longest sample of the batch, packed or not.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class Span(NamedTuple):
    """The place of a sample: from column `start` to before `stop` of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Placement:
    """The spans of a batch's samples, in the samples' order, and the rows that hold them."""

    spans: list[Span]
    rows: int
    width: int

    def spread(self, tokens: Shaped[Tensor, "n ..."], fill: int = 0) -> Shaped[Tensor, "b l ..."]:
        """Puts the tokens of all samples, one sample after the other, in their places."""
        place = tuple(numbers.to(tokens.device) for numbers in self._place)
        rows = tokens.new_full((self.rows, self.width, *tokens.shape[1:]), fill)
        return rows.index_put(place, tokens)  # no view, which FSDP's hooks would warn of

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """Row and column of each token, one sample after the other."""
        lengths = torch.tensor([stop - start for _, start, stop in self.spans])
        row = torch.tensor([span.row for span in self.spans]).repeat_interleave(lengths)
        return row, torch.cat([torch.arange(start, stop) for _, start, stop in self.spans])

    def restart(self, positions: Float[Tensor, "4 b l"]) -> Float[Tensor, "4 b l"]:
        """Makes documents of the padding at the end of rows, none longer than a sample."""
        ends = [0] * self.rows
        for span in self.spans:
            ends[span.row] = max(ends[span.row], span.stop)
        longest = max(1, *(span.stop - span.start for span in self.spans))
        behind = torch.arange(self.width) - torch.tensor(ends)[:, None]  # b l
        count = torch.where(behind < 0, positions[0], (behind % longest).float())
        return torch.cat([count[None], positions[1:]])


def one_a_row(lengths: Sequence[int], padding_side: str = "right") -> Placement:
    """Row i is sample i."""
    width = max(lengths)
    shifts = [width - n if padding_side == "left" else 0 for n in lengths]
    spans = [Span(row, at, at + n) for row, (at, n) in enumerate(zip(shifts, lengths, strict=True))]
    return Placement(spans, len(spans), width)


def pack(lengths: Sequence[int], max_length: int) -> Placement:
    """First fit, the longest first, into rows of at most `max_length` tokens.

    A longer sample is taken as it is, and as rows have one width the others may be as long then.
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
