"""patches x prompt -> relevance: how well each patch answers to the question."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity


def relevance(
    patches: Float[Tensor, "*n p e"], prompt: Float[Tensor, " e"]
) -> Float[Tensor, "*n p"]:
    """Cosine of each aligned patch and one prompt's embedding.

    In float32 whatever the precision: the poolers multiply it by up to 100.
    """
    return cosine_similarity(patches.float(), prompt.float(), dim=-1)
