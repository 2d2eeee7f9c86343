"""A pooler that does not pool: every patch becomes a token."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.recompute import made_again
from lightning_modules.tokens import VisualTokens

from .base import Pooler


class IdentityPooler(Pooler):
    """A pooler that keeps all patches and their grid."""

    def extent(self, before: Grid) -> Grid:
        return before

    def forward(
        self,
        tokens: VisualTokens,
        relevance: Float[Tensor, " l"] | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> VisualTokens:
        if expand is None:
            return tokens
        return replace(tokens, features=made_again(expand, tokens.features))
