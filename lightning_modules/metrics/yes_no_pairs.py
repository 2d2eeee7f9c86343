"""Scores pairs of yes/no questions, as VideoHallucer asks them.

One question of a pair asks about content that the video does not show.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import Task
from lightning_modules.metrics.answers import parse as parsing
from lightning_modules.metrics.base import Answered, Score


class YesNoPairs(Score):
    """Computes VideoHallucer's accuracies (arXiv 2406.16338, §3.3) and the bias of the errors.

    - `pair_basic`, `pair_hallucinated`: share of right answers for each kind of question.
    - `pair_overall`: share of pairs with all questions answered right. Pairs of which only one kind
      was seen are left out.
    - `pair_yes_bias`: share of questions answered yes minus share for which yes is right.
      HallusionBench's "yes percentage difference".
    - `pair_false_yes`: share of the wrong answers that say yes where no is right. HallusionBench's
      "false positive ratio". Left out if no answer is wrong.
    - `pair_unparsed`: share of answers that are neither yes nor no; they count as wrong.

    For a hallucinated question, the published script counts yes by looking at the answer to the
    basic question, so its two bias numbers differ from these.
    """

    names = ("hallucinated", "yes is right", "says yes", "says no")
    lower_is_better = frozenset({"pair_false_yes", "pair_unparsed"})
    undirected = frozenset({"pair_yes_bias"})
    parser = f"parse_yes_no {parsing.VERSION}"

    def __init__(self, max_new_tokens: int = 16) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens

    def asks(self, task: Task | None) -> bool:
        return task is not None and bool(task.pair)

    def row(self, answered: Answered) -> tuple[float, ...]:
        assert answered.task is not None
        task, said = answered.task, self.parse(answered)
        facts = (task.hallucinated, task.answers[0] == "yes", said == "yes", said == "no")
        return tuple(map(float, facts))

    def parse(self, answered: Answered) -> str | None:
        said = parsing.parse_yes_no(answered.said(self.max_new_tokens))
        return None if said is None else "yes" if said else "no"

    def terms(
        self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]
    ) -> dict[str, Float[Tensor, " n"]]:
        hallucinated, truth, yes, no = rows.bool().unbind(1)
        right = torch.where(truth, yes, no)
        return {
            "pair_basic": _where(~hallucinated, right),
            "pair_hallucinated": _where(hallucinated, right),
            "pair_overall": _pairs(hallucinated, right, groups),
            "pair_yes_bias": yes.double() - truth.double(),
            "pair_false_yes": _where(~right, yes & ~truth),
            "pair_unparsed": (~yes & ~no).double(),
        }


def _where(asked: Bool[Tensor, " n"], hits: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns 1 for a hit and 0 for none; NaN for samples that are not asked."""
    return hits.double().masked_fill(~asked, torch.nan)


def _pairs(
    hallucinated: Bool[Tensor, " n"], right: Bool[Tensor, " n"], groups: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Returns, at the first sample of each pair with both kinds, whether all answers are right."""
    terms = torch.full(right.shape, torch.nan, dtype=torch.double)
    for group in groups.unique():
        pair = groups == group
        if hallucinated[pair].any() and not hallucinated[pair].all():
            terms[pair.nonzero()[0]] = float(right[pair].all())
    return terms
