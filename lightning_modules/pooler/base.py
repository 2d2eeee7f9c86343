"""The contract of a pooler: patches and their relevance -> fewer tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from datamodules.batch import Grid


class Pooler(nn.Module, ABC):
    """Computes a weighted mean over windows of one visual's patches.

    The weights of a window sum to 1. So a linear layer gives the same result before and after the
    pooler.

    Attributes:
        uses_prompt: whether `forward` needs the relevance of every patch to a prompt.
        last_effective_tokens: for logs: the effective number of patches per window in the latest
            forward; None if all patches have equal weight.
    """

    uses_prompt: bool = False
    last_effective_tokens: Float[Tensor, ""] | None = None

    @staticmethod
    def relevance(
        patches: Float[Tensor, "*n p e"], prompt: Float[Tensor, " e"]
    ) -> Float[Tensor, "*n p"]:
        """Returns the cosine of each aligned patch and one prompt's embedding.

        It is float32 under every precision, because poolers multiply it by up to 100.
        """
        return cosine_similarity(patches.float(), prompt.float(), dim=-1)

    @abstractmethod
    def grid(self, before: Grid) -> Grid:
        """Returns the grid after pooling the grid `before`.

        Raises:
            ValueError: the windows do not fit into `before`; the message says what would fit.
        """

    @abstractmethod
    def forward(
        self,
        patches: Float[Tensor, "t h w d"],
        relevance: Float[Tensor, "t h w"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "t2 h2 w2 m"]:
        """Pools `expand(patches)`; `expand` maps each patch alone, and None pools the patches.

        `relevance` is the cosine of each patch and the prompt. Without gradients, `expand` runs on
        a few frames at a time, so that its whole result is never in memory. With gradients, its
        result is recomputed in the backward pass instead of kept.
        """
