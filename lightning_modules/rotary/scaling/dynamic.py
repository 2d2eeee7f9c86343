"""Scalings that depend on the longest position: rows as short as in training stay as they are."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .base import Scaling, base_of, stretched


class Dynamic(Scaling):
    """Dynamic NTK: the longer the row, the larger the base.

    The length is the longest position + 1, as in the published code, not the number of tokens.
    While an answer is generated, keys that are stored keep the frequencies of the row so far.

    Source: VideoRoPE, videorope_plus, `MRotaryEmbedding._dynamic_frequency_update`.
    """

    depends_on_length = True

    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        length = torch.as_tensor(length, dtype=torch.float32, device=frequencies.device)
        length = length.clamp(min=self.original_length)
        factor = self.factor_at(length, frequencies)
        return stretched(frequencies, factor * length / self.original_length - (factor - 1))

    def factor_at(
        self, length: Float[Tensor, ""], frequencies: Float[Tensor, " f"]
    ) -> Float[Tensor, ""] | float:
        """Returns the factor of rows of this length."""
        return self.factor


class DynamicByBase(Dynamic):
    """Dynamic NTK whose factor follows from the length and the base; `factor` is not read.

    The factor is (length / 2π)^(d / d') / θ. The first d' channels have turned once in training.

    Source: VideoRoPE, videorope_plus, `MRotaryEmbedding._videoropepp_dynamic_frequency_update`.
    """

    def factor_at(
        self, length: Float[Tensor, ""], frequencies: Float[Tensor, " f"]
    ) -> Float[Tensor, ""] | float:
        base, count = base_of(frequencies), len(frequencies)
        turned = math.ceil(count * math.log(self.original_length / (2 * math.pi), base))
        return (length / (2 * math.pi)) ** (count / turned) / base
