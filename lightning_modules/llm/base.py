"""The contract of an LLM: embeddings, positions -> hidden states -> logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache


class LanguageModel(nn.Module, ABC):
    """A decoder that reads embeddings, so that a row can mix visual and text tokens.

    `width` is m, the width of its embeddings and hidden states.
    """

    width: int

    @abstractmethod
    def replace_rotary(self, build: Callable[[nn.Module], nn.Module]) -> None:
        """Replaces the decoder's rotary module by `build(rotary module)`.

        The new module has `num_axes`, and reads the positions on these axes from its attribute
        `axis_positions`.

        Raises:
            ValueError: on text alone, the new module would differ from the decoder's own.
        """

    @abstractmethod
    def embed(self, ids: Int[Tensor, "*b l"]) -> Float[Tensor, "*b l m"]:
        """Returns the embeddings of text tokens."""

    @abstractmethod
    def forward(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b k"] | None,
        positions: Float[Tensor, "a1 b l"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b l m"]:
        """Returns the hidden states after the last norm.

        Without mask and cache, a row may hold several documents, which do not attend to each
        other. A document begins at each 0 in row 0 of the positions. With a mask or a cache, a row
        is one document.

        Args:
            mask: False on padding; covers the cached tokens too (k ≥ l).
            positions: the result of `RotaryScheme.batch_positions`.
            cache: KV cache that is read and extended.
        """

    @abstractmethod
    def head(self, hidden: Float[Tensor, "*b m"]) -> Float[Tensor, "*b vocab"]:
        """Returns the logits."""

    @abstractmethod
    def generate(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b l"],
        positions: Float[Tensor, "a1 b l"],
        following: Float[Tensor, " b"],
        **options,
    ) -> Int[Tensor, "b2 l2"]:
        """Returns the new token ids for each row.

        Args:
            following: position of the first new token of each row on all axes, from
                `RotaryScheme.batch_following`; each further token advances by 1.
            options: arguments of transformers' `GenerationMixin.generate`.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run; each runs once per batch."""

    @abstractmethod
    def split(self, mesh: DeviceMesh) -> None:
        """Splits the layers of each block over the ranks of `mesh`, which has one axis.

        These ranks must have the same weights before. The input and output of a block stay whole,
        and are the same on all these ranks.

        Raises:
            ValueError: the layers cannot be divided by the number of ranks.
        """

    @abstractmethod
    def to_spec(self) -> dict:
        """Returns the class path and arguments that rebuild this component without its source."""
