"""Splits an image in tiles into two pieces: its thumbnail, and the plane of all its tiles.

Both pieces replace one slot. As in LLaVA-NeXT, the plane holds the patches of the tiles side by
side, without the rows and columns of padding, and a learnt embedding ends each row. A pooler reads
the whole plane, including padding, so that its windows lie as in each tile. After pooling, tokens
that were pooled only from padding are dropped.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import VISUAL_SLOT, Grid, Tiles, VideoBatch


class Piece(NamedTuple):
    """Patches that are pooled together, and whose tokens are adjacent."""

    patches: Float[Tensor, "t h w d"]
    row: int  # of the batch
    tiles: Tiles | None = None  # set if the patches are a plane


def split_pieces(batch: VideoBatch, patches: Float[Tensor, "n h w d"]) -> list[Piece]:
    """Returns one piece for each visual, and two for an image in tiles."""
    if not batch.frame_counts:
        return []
    rows = (batch.input_ids == VISUAL_SLOT).nonzero()[:, 0].tolist()
    visuals = patches.split(batch.frame_counts)
    pieces = []
    for visual, row, tiles in zip(visuals, rows, batch.tiles, strict=True):
        if tiles is None:
            pieces.append(Piece(visual, row))
            continue
        plane = rearrange(visual[1:], "(r s) h w d -> 1 (r h) (s w) d", r=tiles.rows)
        pieces += [Piece(visual[:1], row), Piece(plane, row, tiles)]
    return pieces


def join_pieces(batch: VideoBatch, pieces: Sequence[tuple[Tensor, Grid]]) -> list[list]:
    """Groups the (tokens, grid) pairs of all pieces by visual."""
    rest = iter(pieces)
    return [[next(rest) for _ in range(2 if tiles else 1)] for tiles in batch.tiles]


def lay_out(
    tokens: Float[Tensor, "1 h w m"],
    piece: Piece,
    newline: Float[Tensor, " m"] | None,
) -> Float[Tensor, "1 h2 w2 m"]:
    """Drops the padding tokens of a pooled plane, and ends each row with `newline`."""
    assert piece.tiles is not None
    before, after = piece.patches.shape[1:3], tokens.shape[1:3]
    rows, columns = (
        edge * left // size
        for edge, left, size in zip(edges(piece.tiles, *before), after, before, strict=True)
    )
    tokens = tokens[:, rows : after[0] - rows, columns : after[1] - columns]
    if newline is None:
        return tokens
    ends = newline.to(tokens.dtype).expand(1, tokens.shape[1], 1, -1)
    return torch.cat([tokens, ends], dim=2)  # 1 h w m -> 1 h w+1 m


def edges(tiles: Tiles, height: int, width: int) -> tuple[int, int]:
    """Returns the padding of a plane: rows above (and below), columns on the left (and right).

    The plane has height x width patches. At least one row or column of the image stays: LLaVA-NeXT
    drops an image completely if it is thinner than half a patch.
    """
    if tiles.width / tiles.height > width / height:
        inner = int(round(tiles.height * (width / tiles.width), 7))
        return min((height - inner) // 2, (height - 1) // 2), 0
    inner = int(round(tiles.width * (height / tiles.height), 7))
    return 0, min((width - inner) // 2, (width - 1) // 2)
