"""Windows on a grid of patches, and the weighted mean of each window."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.recompute import made_again
from lightning_modules.tokens import product

#: Frames that are expanded at a time when no gradient is needed.
CHUNK_FRAMES = 4


class FittedWindows(NamedTuple):
    """Windows on one grid: `count` windows along each axis, starting at the first patch."""

    kernel: Grid
    stride: Grid
    count: Grid

    def gather(self, scores: Float[Tensor, "t h w"]) -> Float[Tensor, "t2 h2 w2 window"]:
        """Returns the scores of the patches of each window."""
        for axis in range(3):
            scores = scores.unfold(axis, self.kernel[axis], self.stride[axis])
            scores = scores.narrow(axis, 0, self.count[axis])
        return scores.flatten(3)

    def centres(self, coordinates: Float[Tensor, "t h w 3"]) -> Float[Tensor, "l 3"]:
        """Returns the middle of each window, from the coordinates of the patches.

        The windows are boxes, so the middle is the mean along each axis alone.
        """
        along = coordinates[:, 0, 0, 0], coordinates[0, :, 0, 1], coordinates[0, 0, :, 2]
        middles = [
            axis.unfold(0, size, stride)[:count].mean(1)
            for axis, size, stride, count in zip(along, *self, strict=True)
        ]
        return product(middles)

    def average(
        self,
        patches: Float[Tensor, "t h w d"],
        weights: Float[Tensor, "t2 h2 w2 window"],
        expand: Callable[[Tensor], Tensor] | None,
    ) -> Float[Tensor, "t2 h2 w2 m"]:
        """Returns the weighted sum of `expand(patches)` in each window.

        The results of `expand` are the widest tensors of the model. Without gradients, `expand`
        runs on a few frames at a time. With gradients, its results are recomputed in the backward
        pass instead of kept.
        """
        if expand is None:
            return self._sum(patches, weights)
        if torch.is_grad_enabled():
            return made_again(lambda p, w: self._sum(expand(p), w), patches, weights)
        pooled = []
        for part in weights.split(max(1, CHUNK_FRAMES // self.stride.t)):
            used = (len(part) - 1) * self.stride.t + self.kernel.t
            pooled.append(self._sum(expand(patches[:used]), part))
            patches = patches[len(part) * self.stride.t :]
        return torch.cat(pooled)

    def _sum(
        self, patches: Float[Tensor, "t h w m"], weights: Float[Tensor, "t2 h2 w2 window"]
    ) -> Float[Tensor, "t2 h2 w2 m"]:
        """Returns the weighted sums, with one small matrix product per row of windows and frame.

        If windows neither overlap nor skip patches, the patches that a row of windows reads are a
        view of `patches`, so the wide features are not copied.
        """
        (kt, kh, kw), (st, sh, sw) = self.kernel, self.stride
        t2, h2, w2, _ = weights.shape
        read = patches[: (t2 - 1) * st + kt, : (h2 - 1) * sh + kh]
        rows = read.unfold(0, kt, st).unfold(1, kh, sh)  # t2 h2 w m kt kh
        rows = rearrange(rows, "t2 h2 w m kt kh -> (t2 kt h2) (kh w) m")

        columns = torch.arange(w2, device=weights.device)[:, None] * sw
        columns = columns + torch.arange(kw, device=weights.device)  # w2 kw
        by_patch = rearrange(
            weights.to(patches.dtype), "t h w (kt kh kw) -> t kt h w kh kw", kt=kt, kh=kh
        )
        spread = by_patch.new_zeros(*by_patch.shape[:-1], patches.shape[2])  # t2 kt h2 w2 kh w
        spread = spread.scatter(-1, columns[:, None].expand_as(by_patch), by_patch)
        spread = rearrange(spread, "t kt h w2 kh w -> (t kt h) w2 (kh w)")
        return reduce(spread @ rows, "(t kt h) w m -> t h w m", "sum", t=t2, kt=kt)


class Axis(NamedTuple):
    """Windows along one axis of `size` patches."""

    size: int
    kernel: int
    stride: int
    count: int

    @property
    def fits(self) -> bool:
        return self.kernel > 0 and self.stride > 0 and self.count > 0 and self.end <= self.size

    @property
    def reads_all(self) -> bool:
        gaps = self.count > 1 and self.stride > self.kernel
        return self.end == self.size and not gaps

    @property
    def end(self) -> int:
        return (self.count - 1) * self.stride + self.kernel


def place(size: int, kernel: int | None, stride: int | None, count: int | None) -> Axis:
    """Computes the missing sizes from the given ones (ppllava/models/utils.py:get_size)."""
    if count is None:
        assert kernel is not None
        stride = kernel if stride is None else stride
        return Axis(size, kernel, stride, (size - kernel) // max(stride, 1) + 1)
    if kernel is None:
        stride = size // max(count, 1) if stride is None else stride
        return Axis(size, size - (count - 1) * stride, stride, count)
    return Axis(size, kernel, (size - kernel) // (count - 1) if count > 1 else 1, count)


def nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
