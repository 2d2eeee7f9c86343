"""hidden states -> loss."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX


def next_token_loss(
    hidden: Float[Tensor, "b l m"],
    labels: Int[Tensor, "b l"],
    head: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Mean cross-entropy over the labelled tokens, and how many there are.

    `head` (hidden states to logits) runs only on the hidden states that predict a labelled token:
    for a vocabulary of 152,064 the logits of 8k tokens alone would take 4.6 GiB. Without any label
    the loss is 0, with a gradient, so that all ranks of a run still take the same step.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORE_INDEX
    count = labelled.sum()
    logits = head(hidden[:, :-1][labelled])  # (labelled tokens, vocabulary)
    total = nn.functional.cross_entropy(logits.float(), targets[labelled], reduction="sum")
    return total / count.clamp(min=1), count


def sequence_log_probs(
    hidden: Float[Tensor, "b l m"],
    labels: Int[Tensor, "b l"],
    head: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
    """Of each row, the summed log-probability of its labelled tokens in float32, and their number.

    As in `next_token_loss`, `head` runs only where a labelled token is predicted.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORE_INDEX
    logits = head(hidden[:, :-1][labelled]).float()  # (labelled tokens, vocabulary)
    taken = -nn.functional.cross_entropy(logits, targets[labelled], reduction="none")
    by_row = taken.new_zeros(labelled.shape).masked_scatter(labelled, taken)  # b l
    return by_row.sum(dim=1), labelled.sum(dim=1)
