"""The contract of a score: validation results of samples -> named numbers.

A score keeps a row of numbers for each sample, and computes its values at the end from the rows of
all ranks. Samples are identified by their key, so each counts once for any batching and any number
of ranks. This holds even if ranks repeat samples because their number is not divisible.
"""

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
from datamodules.common.digest import number


@dataclass(frozen=True)
class Answered:
    """One sample and the model's answer to it."""

    key: str
    task: Task | None
    log_prob: float  # sum over all labelled tokens, each given the tokens before it; in nats
    tokens: int  # number of labelled tokens
    options: tuple[float, ...] = ()  # log-probability of each option's letter, as the first token
    said: Callable[[int], str] = lambda tokens: ""  # N -> text of the first N generated tokens


class Value(NamedTuple):
    value: float
    count: int  # number of terms in the mean


class Score(Metric, ABC):
    """Computes named numbers about samples of one kind.

    Attributes:
        columns: how many numbers are kept per sample.
        max_new_tokens: tokens to generate as an answer; 0: no generation.
        parser: name and version of the parser that reads the generated text.
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
        """Returns whether a sample with this task counts."""

    @abstractmethod
    def row(self, answered: Answered) -> Sequence[float]:
        """Returns the numbers to keep for a sample that counts."""

    @abstractmethod
    def values(self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]) -> dict[str, Value]:
        """Returns the numbers by name. `groups` are equal for samples of the same `Task.pair`."""

    def update(self, answered: Sequence[Answered]) -> None:
        """Adds the samples of a batch for which `asks` is true."""
        counted = [sample for sample in answered if self.asks(sample.task)]
        marks = [[number(s.key), number(s.task.pair if s.task else "")] for s in counted]
        rows = [list(self.row(sample)) for sample in counted]
        # Append empty tensors, too: a rank without any tensor could not be gathered with others.
        self.samples.append(torch.tensor(marks, dtype=torch.long, device=self.device).view(-1, 2))
        self.rows.append(torch.tensor(rows, device=self.device).view(-1, self.columns))

    def compute(self) -> dict[str, Value]:
        """Returns the numbers by name; empty if no sample has counted."""
        samples, rows = dim_zero_cat(self.samples).cpu(), dim_zero_cat(self.rows).cpu().double()
        places = distinct(samples[:, 0])
        return self.values(rows[places], samples[places, 1]) if places else {}

    def facts(self) -> dict[str, Any]:
        """Returns the settings that the numbers depend on, as plain containers."""
        return {"parser": self.parser, "max_new_tokens": self.max_new_tokens}


def distinct(marks: Int[Tensor, " n"]) -> list[int]:
    """Returns the index of the first of each mark, in an order that depends on the marks alone."""
    places = {key: place for place, key in reversed(list(enumerate(marks.tolist())))}
    return [places[key] for key in sorted(places)]
