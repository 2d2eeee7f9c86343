"""Perplexity of the answers of held-out samples."""

from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import Task
from lightning_modules.metrics.base import Answered, Score, Value


class Perplexity(Score):
    """Computes exp of the mean negative log-probability over all labelled tokens."""

    names = ("log_prob", "tokens")
    lower_is_better = frozenset({"perplexity"})

    def asks(self, task: Task | None) -> bool:
        return True

    def row(self, answered: Answered) -> tuple[float, ...]:
        return answered.log_prob, float(answered.tokens)

    def terms(
        self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]
    ) -> dict[str, Float[Tensor, " n"]]:
        return {}  # it is no mean over samples

    def values(self, rows: Float[Tensor, "n c"], groups: Int[Tensor, " n"]) -> dict[str, Value]:
        total, tokens = rows.sum(0)
        return {"perplexity": Value((-total / tokens).exp().item(), len(rows))}
