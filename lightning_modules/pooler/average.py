"""The plain mean over each window: the baseline that ignores the prompt."""

import torch
from jaxtyping import Float
from torch import Tensor

from .windowed import WindowPooler
from .windows import FittedWindows


class AveragePooler(WindowPooler):
    """A pooler with equal weights in each window."""

    def weights(
        self, fitted: FittedWindows, relevance: Float[Tensor, "t h w"] | None, device: torch.device
    ) -> Float[Tensor, "t2 h2 w2 window"]:
        size = fitted.kernel.size
        return torch.full((*fitted.count, size), 1 / size, device=device)
