"""The contract of a pooler: patches and their relevance in, fewer tokens out."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from datamodules.batch import Grid


class Pooler(nn.Module, ABC):
    """A weighted mean over windows of one visual's patches; each window's weights sum to 1.

    Because they sum to 1, a linear layer gives the same before and after the pooler.

    Attributes:
        uses_prompt: `forward` needs the relevance of every patch to a prompt.
        last_effective_tokens: of the latest forward, for logs: how many patches count in a
            window; None where all count the same.
    """

    uses_prompt: bool = False
    last_effective_tokens: Float[Tensor, ""] | None = None

    @staticmethod
    def relevance(
        patches: Float[Tensor, "*n p e"], prompt: Float[Tensor, " e"]
    ) -> Float[Tensor, "*n p"]:
        """Returns the cosine of each aligned patch and one prompt's embedding.

        It is float32 whatever the precision, since poolers multiply it by up to 100.
        """
        return cosine_similarity(patches.float(), prompt.float(), dim=-1)

    @abstractmethod
    def grid(self, before: Grid) -> Grid:
        """The grid that is left of `before`.

        Raises:
            ValueError: the windows do not fit into `before`; the message says what would.
        """

    @abstractmethod
    def forward(
        self,
        patches: Float[Tensor, "t h w d"],
        relevance: Float[Tensor, "t h w"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "t2 h2 w2 m"]:
        """Pools `expand(patches)`, a map of every patch by itself (`None`: the patches).

        `relevance` is the cosine of each patch and the prompt. Where no gradient is asked for,
        `expand` runs on a few frames at a time, so that its result never exists as a whole. Where
        one is, its result is not kept for the backward pass, but made again there.
        """
