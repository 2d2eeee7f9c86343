"""embeddings, positions -> hidden states -> logits. The contract of the fourth stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache


class LanguageModel(nn.Module, ABC):
    """A decoder that reads embeddings, so that visuals can stand among the words.

    `width` is m, of its embeddings and hidden states.
    """

    width: int

    @abstractmethod
    def replace_rotary(self, build: Callable[[nn.Module], nn.Module]) -> None:
        """Puts `build(rotary module of the decoder)` in its place.

        Raises:
            ValueError: on text alone the new one would not give what the decoder's own gives.
        """

    @abstractmethod
    def embed(self, ids: Int[Tensor, "*b l"]) -> Float[Tensor, "*b l m"]:
        """Embeddings of text tokens."""

    @abstractmethod
    def forward(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b k"] | None,
        positions: Float[Tensor, "4 b l"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b l m"]:
        """Hidden states after the last norm. `mask` covers the cached tokens too (k ≥ l).

        Without mask and cache a row may hold several documents, which do not see each other: one
        begins wherever row 0 of the positions is 0. `positions` as `RotaryScheme.batch_positions`
        gives them. A `cache` is read and extended.
        """

    @abstractmethod
    def head(self, hidden: Float[Tensor, "*b m"]) -> Float[Tensor, "*b vocab"]:
        """Logits."""

    @abstractmethod
    def generate(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b l"],
        positions: Float[Tensor, "4 b l"],
        following: Float[Tensor, "3 b"],
        **options,
    ) -> Int[Tensor, "b2 l2"]:
        """New token ids after each row.

        Args:
            following: where the first new token of each row stands, as
                `RotaryScheme.batch_following` gives it; each further one is 1 behind it.
            options: those of transformers' `GenerationMixin.generate`.
        """

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The units to shard, in the order in which they run; each runs once for a batch."""

    @abstractmethod
    def split(self, mesh: DeviceMesh) -> None:
        """Splits the layers of each block over the ranks of `mesh`, which has one axis.

        What goes into a block and comes out of it stays whole, and the same on these ranks, whose
        weights are alike before.

        Raises:
            ValueError: the layers cannot be shared by so many.
        """

    @abstractmethod
    def to_spec(self) -> dict:
        """Class path and arguments that rebuild this stage without reading its source again."""
