"""Maps patch features to the LLM's width: LLaVA's two linears, one before and one after pooling."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu


class Projector(nn.Module):
    """Computes `linear_2(gelu(linear_1(x)))`, as the projector of LLaVA-NeXT.

    The second linear commutes with pooling, because the weights of each window sum to 1. It
    therefore runs after pooling, on fewer tokens: `contract(pool(expand(patches)))`.
    """

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def expand(self, patches: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        return gelu(self.linear_1(patches))

    def contract(self, tokens: Float[Tensor, "*n m"]) -> Float[Tensor, "*n m"]:
        return self.linear_2(tokens)
