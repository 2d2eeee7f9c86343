"""The plain mean over each window: the baseline that ignores the prompt."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid

from .base import Pooler
from .windows import Windows


class AveragePooler(Pooler):
    """A pooler with equal weights in each window; the arguments are those of `Windows`."""

    def __init__(
        self,
        kernel: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        output_size: Sequence[int] | None = None,
        image_kernel: Sequence[int] | None = None,
        crop: bool = False,
    ):
        super().__init__()
        self.windows = Windows(kernel, stride, output_size, image_kernel, crop)

    def grid(self, before: Grid) -> Grid:
        return self.windows.fit(before).count

    def forward(
        self,
        patches: Float[Tensor, "t h w d"],
        relevance: Float[Tensor, "t h w"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "t2 h2 w2 m"]:
        fitted = self.windows.fit(Grid(*patches.shape[:3]))
        size = fitted.kernel.size
        weights = torch.full((*fitted.count, size), 1 / size, device=patches.device)
        return fitted.average(patches, weights, expand)
