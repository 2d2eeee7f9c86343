"""The poolers that compute a mean over windows: what all of them have in common."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.tokens import VisualTokens

from .base import Pooler
from .windows import FittedWindows, nearest_divisor, place


class WindowPooler(Pooler):
    """Computes a weighted mean over windows; the weights of a window sum to 1.

    A token stands at the middle of its window, not at the weighted mean of the places. So a prompt
    changes what a token holds, but not where it stands.

    The windows are given by kernel and stride or by an output size. Each triple is (time, rows,
    columns). Give a kernel (if `stride` is None, it equals the kernel), or an output size, alone or
    with one of the other two. A visual with fewer frames than the output size keeps all its frames.

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
        super().__init__()
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

    @abstractmethod
    def weights(
        self, fitted: FittedWindows, relevance: Float[Tensor, "t h w"] | None, device: torch.device
    ) -> Float[Tensor, "t2 h2 w2 window"]:
        """Returns the weights of the patches of each window; those of a window sum to 1."""

    def extent(self, before: Grid) -> Grid:
        return self.fit(before).count

    def forward(
        self,
        tokens: VisualTokens,
        relevance: Float[Tensor, " l"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> VisualTokens:
        fitted = self.fit(tokens.grid)
        patches = tokens.as_grid()
        by_patch = None if relevance is None else relevance.view(*tokens.grid)
        weights = self.weights(fitted, by_patch, patches.device)
        pooled = fitted.average(patches, weights, expand)  # t h w d -> t2 h2 w2 m
        centres = fitted.centres(tokens.layout.coordinates.view(*tokens.grid, 3))
        return tokens.moved(pooled.flatten(0, 2), centres, fitted.count)

    def fit(self, before: Grid) -> "FittedWindows":
        """Returns the windows on a grid of this size.

        Raises:
            ValueError: the windows do not fit; the message names both sizes and what would fit.
        """
        kernel, stride, output_size = self.kernel, self.stride, self.output_size
        if before.t == 1:
            kernel = self.image_kernel if self.kernel else None
        if output_size:
            if before.t <= output_size.t:  # each frame is a window in time
                kernel, stride = (size and size._replace(t=1) for size in (kernel, stride))
            output_size = output_size._replace(t=min(output_size.t, before.t))
        axes = [
            place(
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
            would = [min(before.t, wanted.t), *(nearest_divisor(*pair) for pair in sides)]
        stride = f" with stride {list(self.stride)}" if self.stride else ""
        grid = " x ".join(map(str, before))
        return (
            f"model.pooler.{name} {list(wanted)}{stride} does not fit a grid of {grid} patches "
            f"(time x rows x columns): {would} without a stride would"
        )
