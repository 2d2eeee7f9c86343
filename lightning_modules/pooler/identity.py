"""A pooler that does not pool: every patch becomes a token."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.recompute import made_again

from .base import Pooler


class IdentityPooler(Pooler):
    """A pooler that keeps all patches and their grid."""

    def grid(self, before: Grid) -> Grid:
        return before

    def forward(
        self,
        patches: Float[Tensor, "t h w d"],
        relevance: Float[Tensor, "t h w"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "t h w m"]:
        return patches if expand is None else made_again(expand, patches)
