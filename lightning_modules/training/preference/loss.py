"""Preference losses: log-probabilities of a chosen and a rejected answer -> loss of each pair.

All are functions of the margin by which the policy prefers the chosen answer more than the
reference does. DPO: Rafailov et al., arXiv 2305.18290; label smoothing: Mitchell's "conservative
DPO" (ericmitchell.ai/cdpo.pdf); IPO: Azar et al., arXiv 2310.12036; hinge: SLiC as Liu et al. read
it, arXiv 2309.06657.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class PreferenceLoss(ABC):
    """Losses of pairs; `beta` says how dear it is to leave the reference.

    Raises:
        ValueError: `beta` is not above 0.
    """

    #: Whether log-probabilities are means over the tokens of an answer, and not sums.
    per_token = False

    def __init__(self, beta: float = 0.1):
        if beta <= 0:
            raise ValueError(f"module.loss.beta is {beta}; set it above 0, such as 0.1")
        self.beta = beta

    def __call__(
        self,
        chosen: Float[Tensor, " b"],
        rejected: Float[Tensor, " b"],
        reference_chosen: Float[Tensor, " b"],
        reference_rejected: Float[Tensor, " b"],
    ) -> Float[Tensor, " b"]:
        return self.of_margin((chosen - reference_chosen) - (rejected - reference_rejected))

    @abstractmethod
    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Losses by how much more than the reference the policy prefers the chosen answers."""


class SigmoidLoss(PreferenceLoss):
    """DPO's own: the negative log-likelihood of the preference under Bradley-Terry.

    Args:
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.

    Raises:
        ValueError: `label_smoothing` is not in [0, 0.5).
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0):
        super().__init__(beta)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"module.loss.label_smoothing is {label_smoothing}; set it to 0 or more, below 0.5"
            )
        self.label_smoothing = label_smoothing

    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        right = nn.functional.logsigmoid(self.beta * margin)
        wrong = nn.functional.logsigmoid(-self.beta * margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


class IPOLoss(PreferenceLoss):
    """Regression of the margin to 1 / (2 beta), on means over tokens.

    The paper does not say so, but its authors confirmed to those of TRL that its results are for
    means; sums would ask a longer answer for the same margin.
    """

    per_token = True

    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (margin - 1 / (2 * self.beta)).square()


class HingeLoss(PreferenceLoss):
    """Nothing more to learn once the margin is 1 / beta."""

    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (1 - self.beta * margin).relu()
