"""YaRN: fast frequencies stay, slow ones are divided by the factor, with a ramp between them."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import ORIGINAL_LENGTH, Scaling, base_of


class Yarn(Scaling):
    """YaRN (arXiv 2309.00071), section 3.2 and, with `attention`, equation 22.

    A frequency that turns `fast` times over the rows of training stays, one that turns `slow` times
    is divided by `factor`. VideoRoPE++'s baseline (videorope_plus, scaling_method yarn) leaves out
    the factor on cos and sin: `attention=false`.

    Args:
        attention: whether cos and sin are multiplied by 0.1 ln(factor) + 1, as in the paper.
        fast, slow: turns over the rows of training, between which the ramp lies.
    """

    def __init__(
        self,
        factor: float = 4.0,
        original_length: int = ORIGINAL_LENGTH,
        attention: bool = True,
        fast: float = 32.0,
        slow: float = 1.0,
    ):
        super().__init__(factor, original_length)
        if not 0 < slow < fast:
            raise ValueError(
                f"model.rotary.scaling.slow={slow} and fast={fast}: set 0 < slow < fast"
            )
        self.fast, self.slow = fast, slow
        self.attention_factor = 0.1 * math.log(factor) + 1 if attention else 1.0

    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        base, count = base_of(frequencies), len(frequencies)
        low, high = (self._place(turns, base, count) for turns in (self.fast, self.slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * count - 1)
        places = torch.arange(count, dtype=torch.float32, device=frequencies.device)
        ramp = ((places - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    def _place(self, turns: float, base: float, count: int) -> float:
        """Returns the place (a fraction) of the frequency that turns so often in training."""
        return count * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
