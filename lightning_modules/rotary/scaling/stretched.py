"""Scalings with a larger base: NTK, YaRN-V and M-RoPE++."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.rotary.base import HEIGHT, TIME, WIDTH

from .base import Scaling, stretched


class Ntk(Scaling):
    """NTK-aware scaling: the slowest frequency becomes `factor` times slower, the fastest stays.

    Source: VideoRoPE, videorope_plus, `MRotaryEmbedding.post_init`, scaling_method ntk.
    """

    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        return stretched(frequencies, self.factor)


class _ByAxis(Scaling):
    """A scaling that treats time, height and width each in its own way."""

    num_axes = 3

    @property
    def ratio(self) -> float:
        """The last position of the longer rows, divided by that of training."""
        return (self.original_length * self.factor - 1) / (self.original_length - 1)


class YarnV(_ByAxis):
    """YaRN-V (VideoRoPE++): only the frequencies of time are stretched.

    Source: VideoRoPE, videorope_plus, `MRotaryEmbedding.post_init`, scaling_method videorope++_v1.
    There the slowest quarter of the frequencies is stretched, which is time under VideoRoPE.
    """

    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        return torch.where(axes == TIME, stretched(frequencies, self.ratio), frequencies)


class MRopePlusPlus(_ByAxis):
    """M-RoPE++: time stays, width is stretched, height is halfway between stretched and linear.

    Source: VideoRoPE, videorope_plus, `MRotaryEmbedding.post_init`, scaling_method mrope++.
    """

    def scale(
        self,
        frequencies: Float[Tensor, " f"],
        axes: Int[Tensor, " f"],
        length: Float[Tensor, ""] | float,
    ) -> Float[Tensor, " f"]:
        wide = stretched(frequencies, self.ratio)
        high = (wide + frequencies / self.factor) / 2
        scaled = torch.where(axes == WIDTH, wide, frequencies)
        return torch.where(axes == HEIGHT, high, scaled)
