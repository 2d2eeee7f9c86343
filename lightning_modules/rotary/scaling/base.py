"""The contract of a scaling: the frequencies of an LLM -> those for longer rows."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Longest row of Qwen2's training, in positions; the published code fixes it.
ORIGINAL_LENGTH = 32768


class Scaling(ABC):
    """Slows frequencies down so that longer rows turn by the angles of training.

    No weights change, so a trained model can be tested with any scaling.

    Args:
        factor: how many times longer a row may be than in training.
        original_length: longest row of the LLM's training, in positions.

    Attributes:
        attention_factor: what cos and sin are multiplied by.
        depends_on_length: whether the frequencies depend on the longest position of a batch.
        num_axes: the number of axes that a scheme must have; None: any.

    Raises:
        ValueError: an argument is out of range.
    """

    attention_factor: float = 1.0
    depends_on_length: bool = False
    num_axes: int | None = None

    def __init__(self, factor: float = 4.0, original_length: int = ORIGINAL_LENGTH):
        if factor < 1:
            raise ValueError(f"model.rotary.scaling.factor is {factor}; set it to 1 or more")
        if original_length < 2:
            raise ValueError(
                f"model.rotary.scaling.original_length is {original_length}; set it to 2 or more"
            )
        self.factor, self.original_length = factor, original_length

    @abstractmethod
    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        """Returns the frequencies (radians per position) to use instead.

        Args:
            frequencies: those of the scheme, fastest first.
            axes: the axis that each frequency reads.
            length: the longest position of the batch + 1, on any axis.
        """

    def check(self, num_axes: int) -> None:
        """Checks that the scaling fits a scheme with this number of axes.

        Raises:
            ValueError: it does not.
        """
        if self.num_axes not in (None, num_axes):
            raise ValueError(
                f"{type(self).__name__} scales each of {self.num_axes} axes in its own way, but "
                f"this rotary scheme has {num_axes}: choose scaling=ntk, or rotary=videorope"
            )


def stretched(
    frequencies: Float[Tensor, " f"], by: Float[Tensor, ""] | float
) -> Float[Tensor, " f"]:
    """Returns the frequencies of a base that is `by`^(d / (d - 2)) times as large (NTK).

    The fastest frequency stays, and the slowest one becomes `by` times slower.
    """
    return frequencies * by ** -_place(frequencies)


def base_of(frequencies: Float[Tensor, " f"]) -> float:
    """Returns θ of a ladder θ^(-2n/d).

    Raises:
        ValueError: the frequencies are no such ladder: the LLM scales them itself.
    """
    count = len(frequencies)
    base = float(frequencies[-1].double() ** (-count / (count - 1)))
    ladder = base ** (-torch.arange(count, device=frequencies.device).double() / count)
    if not torch.allclose(ladder.float(), frequencies, rtol=1e-4):
        raise ValueError(
            "model.rotary.scaling needs the frequencies of an LLM that does not scale them itself: "
            "choose scaling=null, or an llm whose rope_type is default"
        )
    return base


def _place(frequencies: Float[Tensor, " f"]) -> Float[Tensor, " f"]:
    """Returns the place of each frequency, from 0 (fastest) to 1 (slowest)."""
    count = len(frequencies)
    return torch.arange(count, dtype=torch.float32, device=frequencies.device) / (count - 1)
