"""The contract of a pooler: tokens and their relevance -> fewer tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from datamodules.batch import Grid
from lightning_modules.tokens import VisualTokens


class Pooler(nn.Module, ABC):
    """Makes fewer tokens of one visual.

    A token stands at the centre of the patches that it was made of, on the extent of the visual. A
    prompt may choose which patches are kept. But it must not move a token that is made of the same
    patches, as weights of a mean would.

    The projector's second layer, which is linear, runs after the pooler. So each token must be a
    weighted sum of results of `expand`, with weights that sum to 1. A patch that is kept alone has
    the weight 1. All else (a maximum, layers of the pooler's own) is done before `expand`.

    Attributes:
        uses_prompt: whether `forward` needs the relevance of every token to a prompt. The features
            must then depend on it for autograd, with a gradient of 0 at least: DDP waits for the
            gradients of the text tower.
        regular: whether the tokens stand on a grid of time steps, rows and columns. Images in tiles
            need it, because the padding of their plane is cut off after pooling.
        last_effective_tokens: for logs: the effective number of patches per new token in the latest
            forward; None if all patches have equal weight.
    """

    uses_prompt: bool = False
    regular: bool = True
    last_effective_tokens: Float[Tensor, ""] | None = None

    @staticmethod
    def relevance(
        patches: Float[Tensor, "l e"], prompt: Float[Tensor, " e"]
    ) -> Float[Tensor, " l"]:
        """Returns the cosine of each aligned patch and one prompt's embedding.

        It is float32 under every precision, because poolers multiply it by up to 100.
        """
        return cosine_similarity(patches.float(), prompt.float(), dim=-1)

    @abstractmethod
    def extent(self, before: Grid) -> Grid:
        """Returns the grid that the new tokens fill after `reindex`; its size is their number.

        It needs no features, so the number of tokens is known before anything is computed.

        Raises:
            ValueError: the pooler does not fit the grid `before`; the message says what would fit.
        """

    def width(self, width: int) -> int:
        """Returns the width of the features that `expand` reads, for patches of width `width`."""
        return width

    @abstractmethod
    def forward(
        self,
        tokens: VisualTokens,
        relevance: Float[Tensor, " l"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> VisualTokens:
        """Pools `expand(features)`; `expand` maps each patch alone, and None pools the features.

        The new tokens are in reading order: `layout.number` does not decrease.

        `relevance` is the cosine of each patch and the prompt. Without gradients, `expand` runs on
        a few frames at a time, so that its whole result is never in memory. With gradients, its
        result is recomputed in the backward pass instead of kept.
        """
