"""Scores pairs of yes/no questions, as VideoHallucer asks them.

One question of a pair asks about content that the video does not show.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from datamodules.batch import Task
from lightning_modules.metrics.answers import parse as parsing
from lightning_modules.metrics.base import Answered, Score, Value


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

    columns = 4  # hallucinated, yes is right, says yes, says no
    parser = f"parse_yes_no {parsing.VERSION}"

    def __init__(self, max_new_tokens: int = 16) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens

    def asks(self, task: Task | None) -> bool:
        return task is not None and bool(task.pair)

    def row(self, answered: Answered) -> tuple[float, ...]:
        assert answered.task is not None
        task, said = answered.task, parsing.parse_yes_no(answered.said(self.max_new_tokens))
        facts = (task.hallucinated, task.answers[0] == "yes", said is True, said is False)
        return tuple(map(float, facts))

    def values(self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]) -> dict[str, Value]:
        hallucinated, truth, yes, no = rows.bool().unbind(1)
        right = torch.where(truth, yes, no)
        return {
            **_mean("pair_basic", right[~hallucinated]),
            **_mean("pair_hallucinated", right[hallucinated]),
            **_mean("pair_overall", _pairs(hallucinated, right, groups)),
            "pair_yes_bias": Value((yes.double() - truth.double()).mean().item(), len(rows)),
            **_mean("pair_false_yes", (yes & ~truth)[~right]),
            **_mean("pair_unparsed", ~yes & ~no),
        }


def _mean(name: str, hits: Bool[Tensor, " n"]) -> dict[str, Value]:
    return {name: Value(hits.double().mean().item(), len(hits))} if len(hits) else {}


def _pairs(
    hallucinated: Bool[Tensor, " n"], right: Bool[Tensor, " n"], groups: Int[Tensor, " n"]
) -> Bool[Tensor, " p"]:
    """Returns, for every pair with both kinds of questions, whether all answers are right."""
    found = [groups == group for group in groups.unique()]
    whole = [pair for pair in found if hallucinated[pair].any() and not hallucinated[pair].all()]
    return torch.tensor([bool(right[pair].all()) for pair in whole], dtype=torch.bool)
