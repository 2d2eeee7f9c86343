"""Maps patch features to the LLM's width: LLaVA's two linears, one before and one after pooling."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu


class Projector(nn.Module):
    """Computes `linear_2(gelu(linear_1(x)))`, as the projector of LLaVA-NeXT.

    The second linear commutes with pooling, because the weights of each window sum to 1. It
    therefore runs after pooling, on fewer tokens: `contract(pool(expand(patches)))`.

    Args:
        width_between: width after the first linear; None: `width_out`, as in LLaVA.
    """

    def __init__(self, width_in: int, width_out: int, width_between: int | None = None):
        super().__init__()
        between = width_out if width_between is None else width_between
        self.linear_1 = nn.Linear(width_in, between)
        self.linear_2 = nn.Linear(between, width_out)

    def expand(self, patches: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        return gelu(self.linear_1(patches))

    def contract(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        return self.linear_2(tokens)
