"""Preference losses: log-probabilities of a chosen and a rejected answer -> loss of each pair.

All losses are functions of the margin: by how much more than the reference the policy prefers the
chosen answer. Sources: DPO: Rafailov et al., arXiv 2305.18290; label smoothing: Mitchell's
"conservative DPO" (ericmitchell.ai/cdpo.pdf); IPO: Azar et al., arXiv 2310.12036; hinge: SLiC as in
Liu et al., arXiv 2309.06657.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class PreferenceLoss(ABC):
    """Computes the loss of each pair.

    Args:
        beta: strength of the pull towards the reference model.

    Raises:
        ValueError: `beta` is not above 0.
    """

    #: Whether log-probabilities are means over the tokens of an answer, instead of sums.
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
        """Returns the losses for the margins of the policy over the reference."""


class SigmoidLoss(PreferenceLoss):
    """The DPO loss: negative log-likelihood of the preference in the Bradley-Terry model.

    Args:
        beta: as in `PreferenceLoss`.
        label_smoothing: assumed share of pairs with swapped labels.

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
    """The IPO loss: squared distance of the margin to 1 / (2 beta), on means over tokens.

    The paper does not mention means, but its authors confirmed to the authors of TRL that its
    results use them. With sums, long answers would need the same margin as short ones.
    """

    per_token = True

    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (margin - 1 / (2 * self.beta)).square()


class HingeLoss(PreferenceLoss):
    """The hinge loss: zero once the margin reaches 1 / beta."""

    def of_margin(self, margin: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (1 - self.beta * margin).relu()
