"""The contract of a score: validation results of samples -> named numbers.

A score keeps a row of numbers for each sample. At the end it computes terms from the rows of all
ranks: the value of each sample, by the name of the number. A named number is the mean of its terms.
Samples are identified by their key, so each counts once for any batching and any number of ranks.
This holds even if ranks repeat samples because their number is not divisible.
"""

import math
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
        names: names of the numbers of a `row`. By default each is a result: the mean over samples.
        lower_is_better: names of results for which lower is better.
        undirected: names of results that are neither better higher nor lower, such as a bias.
        max_new_tokens: tokens to generate as an answer; 0: no generation.
        parser: name and version of the parser that reads the generated text.
        terms_by_sample: after `compute`, the terms of each sample by the number of its key.
    """

    full_state_update = False
    names: tuple[str, ...]
    lower_is_better: frozenset[str] = frozenset()
    undirected: frozenset[str] = frozenset()
    max_new_tokens: int = 0
    parser: str | None = None
    samples: list[Tensor]
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.terms_by_sample: dict[int, dict[str, float]] = {}

    @abstractmethod
    def asks(self, task: Task | None) -> bool:
        """Returns whether a sample with this task counts."""

    @abstractmethod
    def row(self, answered: Answered) -> Sequence[float]:
        """Returns the numbers to keep for a sample that counts, one for each of `names`."""

    def terms(
        self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]
    ) -> dict[str, Float[Tensor, " n"]]:
        """Returns the value of each sample, by the name of the result. NaN: it has no term.

        By default, each column of `rows` is a result. `groups` are equal for samples of the same
        `Task.pair`.
        """
        return dict(zip(self.names, rows.unbind(1), strict=True))

    def values(self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]) -> dict[str, Value]:
        """Returns the results by name: the means of the terms. Override it for other statistics."""
        found = {name: term[~term.isnan()] for name, term in self.terms(rows, groups).items()}
        return {n: Value(term.mean().item(), len(term)) for n, term in found.items() if len(term)}

    def parse(self, answered: Answered) -> str | None:
        """Returns what the parser reads in the generated text; None: nothing."""
        return None

    def update(self, answered: Sequence[Answered]) -> None:
        """Adds the samples of a batch for which `asks` is true."""
        counted = [sample for sample in answered if self.asks(sample.task)]
        marks = [[number(s.key), number(s.task.pair if s.task else "")] for s in counted]
        rows = [list(self.row(sample)) for sample in counted]
        # Append empty tensors, too: a rank without any tensor could not be gathered with others.
        self.samples.append(torch.tensor(marks, dtype=torch.long, device=self.device).view(-1, 2))
        # Name the dtype: trainer.precision=bf16-true changes torch's default.
        kept = torch.tensor(rows, dtype=torch.double, device=self.device)
        self.rows.append(kept.view(-1, len(self.names)))

    def compute(self) -> dict[str, Value]:
        """Returns the numbers by name; empty if no sample has counted."""
        samples, rows = dim_zero_cat(self.samples).cpu(), dim_zero_cat(self.rows).cpu()
        self.terms_by_sample = {}
        places = distinct(samples[:, 0])
        if not places:
            return {}
        rows, groups = rows[places], samples[places, 1]
        terms = self.terms(rows, groups)
        for place, mark in enumerate(samples[places, 0].tolist()):
            own = {name: term[place].item() for name, term in terms.items()}
            self.terms_by_sample[mark] = {n: v for n, v in own.items() if not math.isnan(v)}
        return self.values(rows, groups)

    def facts(self, name: str) -> dict[str, Any]:
        """Returns the settings that the result `name` depends on, and which direction is better."""
        better = None if name in self.undirected else name not in self.lower_is_better
        facts = {"parser": self.parser, "max_new_tokens": self.max_new_tokens}
        return {**facts, "higher_is_better": better}


def distinct(marks: Int[Tensor, " n"]) -> list[int]:
    """Returns the index of the first of each mark, in an order that depends on the marks alone."""
    places = {key: place for place, key in reversed(list(enumerate(marks.tolist())))}
    return [places[key] for key in sorted(places)]
