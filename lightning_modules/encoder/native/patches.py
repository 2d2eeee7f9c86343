"""Frames -> patches in the order of Qwen-VL's towers, and the chunks in which they are read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


class Steps(NamedTuple):
    """Time steps `first` to `last` - 1 of one visual, which are read together."""

    visual: int  # its number
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first


class PatchSizes(NamedTuple):
    """How a tower cuts frames: frames of a step, side of a patch, patches along a token's side."""

    frames: int
    side: int
    merge: int


class PatchEmbedding(nn.Conv3d):
    """Embeds patches that are already cut: the convolution is one matrix product."""

    def forward(self, patches: Float[Tensor, "p pixels"]) -> Float[Tensor, "p d"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)

    @classmethod
    def like(cls, convolution: nn.Conv3d) -> "PatchEmbedding":
        """Returns a module with the parameters of `convolution`, which are not copied."""
        with torch.device("meta"):
            sizes = convolution.kernel_size
            made = cls(convolution.in_channels, convolution.out_channels, sizes, bias=False)  # pyright: ignore[reportArgumentType]
        made.weight = convolution.weight
        return made


def split_steps(counts: Sequence[int], size: int | None) -> list[list[Steps]]:
    """Splits the time steps of visuals into chunks of `size` steps; None: into one chunk.

    A chunk may hold the end of one visual and the beginning of the next one.

    Args:
        counts: time steps of each visual.
    """
    size = size or max(1, sum(counts))
    chunks: list[list[Steps]] = [[]]
    room = size
    for visual, count in enumerate(counts):
        first = 0
        while first < count:
            if not room:
                chunks.append([])
                room = size
            last = min(count, first + room)
            chunks[-1].append(Steps(visual, first, last))
            room -= last - first
            first = last
    return chunks


def cut_patches(
    frames: Num[Tensor, "t c h w"], steps: Steps, sizes: PatchSizes
) -> Float[Tensor, "p pixels"]:
    """Returns the normalised patches of some time steps.

    Order of patches: time step, row of tokens, column of tokens, then row and column in the token.
    Order in a patch: channel, frame of the step, row, column. If the last step has too few frames,
    the last frame is repeated.
    """
    taken = frames[steps.first * sizes.frames : steps.last * sizes.frames]
    if missing := steps.count * sizes.frames - len(taken):
        taken = torch.cat([taken, taken[-1:].expand(missing, -1, -1, -1)])
    return rearrange(
        normalise(taken),
        "(t f) c (h m a) (w n b) -> (t h w m n) (c f a b)",
        f=sizes.frames,
        m=sizes.merge,
        n=sizes.merge,
        a=sizes.side,
        b=sizes.side,
    )


def normalise(frames: Num[Tensor, "t c h w"]) -> Float[Tensor, "t c h w"]:
    """Normalises uint8 RGB as CLIP does, in float32; float frames are returned unchanged."""
    if frames.is_floating_point():
        return frames
    # float32 by name: in bf16-true the default dtype is bfloat16.
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=frames.device)[:, None, None]
        for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    )
    return (frames.float() / 255 - mean) / std


def places(
    height: int, width: int, merge: int, device: torch.device
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Returns row and column of each patch of one time step, in the order of `cut_patches`.

    Args:
        height, width: rows and columns of tokens.
    """
    row, column = (
        torch.arange(n * merge, dtype=torch.float32, device=device) for n in (height, width)
    )
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"))
    grid = rearrange(grid, "x (h m) (w n) -> x (h w m n)", m=merge, n=merge)
    return grid[0], grid[1]
