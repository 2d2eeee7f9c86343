"""Computes the log-probabilities of the labelled tokens of each row from hidden states."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX


def sequence_log_probs(
    hidden: Float[Tensor, "b l m"],
    labels: Int[Tensor, "b l"],
    head: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Returns each row's log-probability, summed over its labelled tokens, and their number.

    The sums are float32. Negated, they are the cross-entropy of next-token prediction. `head`
    (hidden states to logits) runs only on the hidden states that predict a labelled token. With a
    vocabulary of 152,064, the logits of 8k tokens alone would take 4.6 GiB. A row without labels
    gives 0, with a gradient, so that all ranks of a run still take the same step.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORE_INDEX
    logits = head(hidden[:, :-1][labelled]).float()  # (labelled tokens, vocabulary)
    taken = -nn.functional.cross_entropy(logits, targets[labelled], reduction="none")
    by_row = taken.new_zeros(labelled.shape).masked_scatter(labelled, taken)  # b l
    return by_row.sum(dim=1), labelled.sum(dim=1)
