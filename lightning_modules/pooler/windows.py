"""Places windows on a grid of patches, and computes the weighted mean of each window."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.recompute import made_again

#: Frames that are expanded at a time when no gradient is needed.
CHUNK_FRAMES = 4


class Windows:
    """Sizes and distances of a pooler's windows, given by kernel and stride or by an output size.

    Each triple is (time, rows, columns). Give a kernel (if `stride` is None, it equals the kernel),
    or an output size, alone or with one of the other two. A visual with fewer frames than the
    output size keeps all its frames.

    Args:
        image_kernel: kernel for visuals of one frame; None: `kernel` with a time of 1.
        crop: drops the rows and columns that no window reads, as PPLLaVA's code does. Without it,
            such windows raise an error. Frames that no window reads are always dropped.

    Raises:
        ValueError: kernel and output size are both missing, or all three sizes are given.
    """

    def __init__(
        self,
        kernel: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        output_size: Sequence[int] | None = None,
        image_kernel: Sequence[int] | None = None,
        crop: bool = False,
    ):
        if (kernel is None and output_size is None) or None not in (kernel, stride, output_size):
            raise ValueError(
                "set one or two of model.pooler.kernel, stride and output_size, not stride alone; "
                f"they are {kernel}, {stride} and {output_size}"
            )
        self.kernel, self.stride, self.output_size, self.image_kernel = (
            None if triple is None else Grid(*triple)
            for triple in (kernel, stride, output_size, image_kernel)
        )
        if self.kernel and not self.image_kernel:
            self.image_kernel = self.kernel._replace(t=1)
        self.crop = crop

    def fit(self, before: Grid) -> "FittedWindows":
        """Returns the windows on a grid of this size.

        Raises:
            ValueError: the windows do not fit; the message names both sizes and what would fit.
        """
        kernel, stride, output_size = self.kernel, self.stride, self.output_size
        if before.t == 1:
            kernel = self.image_kernel if self.kernel else None
        if output_size:
            output_size = output_size._replace(t=min(output_size.t, before.t))
        axes = [
            _place(
                before[axis],
                kernel[axis] if kernel else None,
                stride[axis] if stride else None,
                output_size[axis] if output_size else None,
            )
            for axis in range(3)
        ]
        all_read = [axis.reads_all for axis in axes[1:]]
        if not all(axis.fits for axis in axes) or not (self.crop or all(all_read)):
            raise ValueError(self._misfit(before, kernel))
        return FittedWindows(
            Grid(*(axis.kernel for axis in axes)),
            Grid(*(axis.stride for axis in axes)),
            Grid(*(axis.count for axis in axes)),
        )

    def _misfit(self, before: Grid, kernel: Grid | None) -> str:
        if self.output_size:
            name, wanted = "output_size", self.output_size
            would = [min(pair) for pair in zip(before, wanted, strict=True)]
        else:
            assert kernel is not None
            name, wanted = ("image_kernel" if before.t == 1 else "kernel"), kernel
            sides = zip(before[1:], wanted[1:], strict=True)
            would = [min(before.t, wanted.t), *(_nearest_divisor(*pair) for pair in sides)]
        stride = f" with stride {list(self.stride)}" if self.stride else ""
        grid = " x ".join(map(str, before))
        return (
            f"model.pooler.{name} {list(wanted)}{stride} does not fit a grid of {grid} patches "
            f"(time x rows x columns): {would} without a stride would"
        )


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


class _Axis(NamedTuple):
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


def _place(size: int, kernel: int | None, stride: int | None, count: int | None) -> _Axis:
    """Computes the missing sizes from the given ones (ppllava/models/utils.py:get_size)."""
    if count is None:
        assert kernel is not None
        stride = kernel if stride is None else stride
        return _Axis(size, kernel, stride, (size - kernel) // max(stride, 1) + 1)
    if kernel is None:
        stride = size // max(count, 1) if stride is None else stride
        return _Axis(size, size - (count - 1) * stride, stride, count)
    return _Axis(size, kernel, (size - kernel) // (count - 1) if count > 1 else 1, count)


def _nearest_divisor(size: int, wanted: int) -> int:
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))
