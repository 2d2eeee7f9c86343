"""Stretches CLIP's text positions from 77 to 248, so that longer questions fit.

The first positions were trained on nearly every caption and stay unchanged. The others are
stretched by linear interpolation (Long-CLIP, arXiv 2403.15378; PPLLaVA, arXiv 2411.02327,
section 3.3).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, SiglipTextModel


def stretch_positions(
    table: Float[Tensor, "old d"], length: int, kept: int
) -> Float[Tensor, "length d"]:
    """Returns a table of `length` positions: the first `kept` unchanged, the others interpolated.

    The last position has no next one, so it is extrapolated with the step that leads to it.

    Raises:
        ValueError: `length` is not `kept` plus a whole multiple of the number of other positions.
    """
    others = table.shape[0] - kept
    factor, left_over = divmod(length - kept, others) if others > 1 else (0, 0)
    if left_over or factor < 1:
        raise ValueError(
            f"{table.shape[0]} text positions, of which the first {kept} are kept, cannot be "
            f"stretched to {length}: set model.encoder.context_length to {kept} + k * {others}, "
            f"such as {kept + 4 * others}"
        )
    start = table[kept:, None]  # others 1 d
    follower = torch.cat([table[kept + 1 :], 2 * table[-1:] - table[-2:-1]])[:, None]
    steps = torch.arange(factor, dtype=table.dtype, device=table.device)[:, None] / factor
    stretched = start * (1 - steps) + follower * steps  # others factor d
    return torch.cat([table[:kept], stretched.flatten(0, 1)])


class SplitPositions(nn.Module):
    """A position table in two parameters, so that one can be trained and the other frozen.

    It replaces the `nn.Embedding` of transformers' CLIP text tower.
    """

    def __init__(self, table: Float[Tensor, "length d"], kept: int):
        super().__init__()
        self.kept = nn.Parameter(table[:kept].detach().clone())
        self.stretched = nn.Parameter(table[kept:].detach().clone())

    @property
    def weight(self) -> Float[Tensor, "length d"]:
        return torch.cat([self.kept, self.stretched])

    def forward(self, position_ids: Int[Tensor, "*b k"]) -> Float[Tensor, "*b k d"]:
        return nn.functional.embedding(position_ids, self.weight)


def extend_context(text: CLIPTextModel | SiglipTextModel, length: int, kept: int) -> None:
    """Extends `text` to `length` positions, in place; a table of that length is only split.

    Token embeddings and layers do not change.
    """
    table = text.embeddings.position_embedding.weight
    if table.shape[0] != length:
        table = stretch_positions(table, length, kept)
    text.embeddings.register_module("position_embedding", SplitPositions(table, kept))
    position_ids = torch.arange(length).expand(1, -1)
    text.embeddings.register_buffer("position_ids", position_ids, persistent=False)
    text.config.max_position_embeddings = length
