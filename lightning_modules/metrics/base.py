"""What validation has seen of a sample -> numbers with names. The contract of a score.

A score keeps a row of numbers for each sample, and reckons with all rows of all ranks at the end.
Samples are known by their key, so that each counts once however they were batched and shared, also
where ranks repeat some because their number does not divide.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.batch import Task


@dataclass(frozen=True)
class Answered:
    """One sample, as the model answered it."""

    key: str
    task: Task | None
    log_prob: float  # nats, of all labelled tokens together, given those before each
    tokens: int  # that are labelled
    options: tuple[float, ...] = ()  # log-probability of each option's letter, as the first token
    said: Callable[[int], str] = lambda tokens: ""  # text of the first so many generated tokens


class Value(NamedTuple):
    value: float
    count: int  # of what it is a mean of


class Score(Metric, ABC):
    """Numbers about samples of one kind.

    Attributes:
        columns: numbers that are kept of a sample.
        max_new_tokens: to generate as an answer; 0: none are needed.
        parser: what reads the generated text, with its version.
    """

    full_state_update = False
    columns: int
    max_new_tokens: int = 0
    parser: str | None = None
    samples: list[Tensor]
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def asks(self, task: Task | None) -> bool:
        """Whether a sample with such a task counts."""

    @abstractmethod
    def row(self, answered: Answered) -> Sequence[float]:
        """What to keep of a sample that counts."""

    @abstractmethod
    def values(self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]) -> dict[str, Value]:
        """The numbers by name. `groups` are equal for samples of the same `Task.pair`."""

    def update(self, answered: Sequence[Answered]) -> None:
        """The samples of a batch, of which those count that `asks` says."""
        counted = [sample for sample in answered if self.asks(sample.task)]
        marks = [[mark(s.key), mark(s.task.pair if s.task else "")] for s in counted]
        rows = [list(self.row(sample)) for sample in counted]
        # Empty ones too: ranks that have kept nothing could not be gathered with others.
        self.samples.append(torch.tensor(marks, dtype=torch.long, device=self.device).view(-1, 2))
        self.rows.append(torch.tensor(rows, device=self.device).view(-1, self.columns))

    def compute(self) -> dict[str, Value]:
        """Empty where no sample has counted."""
        samples, rows = dim_zero_cat(self.samples).cpu(), dim_zero_cat(self.rows).cpu().double()
        places = distinct(samples[:, 0])
        return self.values(rows[places], samples[places, 1]) if places else {}

    def facts(self) -> dict[str, Any]:
        """What its numbers depend on, as plain containers."""
        return {"parser": self.parser, "max_new_tokens": self.max_new_tokens}


def distinct(marks: Int[Tensor, " n"]) -> list[int]:
    """Returns the place of the first of each mark, in an order that depends on the marks alone."""
    places = {key: place for place, key in reversed(list(enumerate(marks.tolist())))}
    return [places[key] for key in sorted(places)]


def mark(text: str) -> int:
    """A number that stands for a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
