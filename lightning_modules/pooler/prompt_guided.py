"""Prompt-guided 3-D pooling: in each window, patches relevant to the question get more weight.

Source: PPLLaVA, arXiv 2411.02327, section 3.2; code in ppllava/models/llava_projector.py and
utils.py.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .windowed import WindowPooler
from .windows import FittedWindows


class PromptGuidedPooler(WindowPooler):
    """Weights patches by the softmax, over each window, of CLIP's logit exp(logit_scale) * cosine.

    This equals the paper's softmax over all patches of the visual, normalised to sum to 1 in each
    window. The published code applies a second softmax instead. With `double_softmax`, the weights
    of a window are the softmax of (the softmax over all patches) / temperature. Over thousands of
    patches, the first softmax gives values near zero, so these weights are nearly equal;
    `last_effective_tokens` shows it.

    Args:
        temperature: divides the input of the last softmax; None is 1, or 0.01 with double_softmax,
            as published.
        logit_scale: ln of CLIP's logit scale, stored with the weights and not trained; the default
            is ln 100, the value of OpenAI's trained models.
        windows: the arguments of `WindowPooler`.

    Attributes:
        last_effective_tokens: effective number of patches per window in the latest forward: exp of
            the entropy of the weights, averaged over windows. It lies between 1 and the window's
            size.
    """

    uses_prompt = True

    def __init__(
        self,
        temperature: float | None = None,
        double_softmax: bool = False,
        logit_scale: float = math.log(100),
        **windows: Any,
    ):
        super().__init__(**windows)
        self.double_softmax = double_softmax
        self.temperature = (0.01 if double_softmax else 1.0) if temperature is None else temperature
        if self.temperature <= 0:
            raise ValueError(f"model.pooler.temperature {temperature} must be above 0")
        # A tensor of one element, because FSDP2 does not shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([logit_scale]), requires_grad=False)

    def weights(
        self, fitted: FittedWindows, relevance: Float[Tensor, "t h w"] | None, device: torch.device
    ) -> Float[Tensor, "t2 h2 w2 window"]:
        if relevance is None:
            raise ValueError("prompt-guided pooling needs the relevance of every patch")
        scores = relevance.float() * self.logit_scale.float().exp()
        if self.double_softmax:
            scores = scores.flatten().softmax(0).view_as(scores)
        weights = (fitted.gather(scores) / self.temperature).softmax(-1)
        entropy = torch.special.entr(weights.detach()).sum(-1)
        self.last_effective_tokens = entropy.exp().mean()
        return weights
