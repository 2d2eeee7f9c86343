"""An image in tiles is two pieces: its thumbnail, and the plane of all its tiles.

Both pieces replace one slot. As in LLaVA-NeXT, the plane holds the patches of the tiles side by
side, without the rows and columns of padding, and a learnt embedding ends each row. A pooler reads
the whole plane, including padding, so that its windows lie as in each tile. After pooling, tokens
that were pooled only from padding are dropped.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from datamodules.batch import VISUAL_SLOT, Grid, Tiles, VideoBatch, Visual
from lightning_modules.tokens import VisualTokens


class Piece(NamedTuple):
    """Tokens that are pooled together."""

    tokens: VisualTokens
    visual: int  # its number in the batch; one behind the last for a visual without a slot
    row: int  # of the batch
    tiles: Tiles | None = None  # set if the tokens are a plane


def split_tiles(visuals: Sequence[Visual]) -> list[Visual]:
    """Returns what the encoder reads: each frame of an image in tiles is a visual of its own."""
    return [
        part for visual in visuals for part in (_frames(visual) if visual.info.tiles else [visual])
    ]


def _frames(visual: Visual) -> list[Visual]:
    """Returns the thumbnail and the tiles. Only the first one can continue another visual."""
    info = visual.info._replace(tiles=None)
    infos = [info, *[info._replace(continues=False)] * (len(visual.frames) - 1)]
    return [Visual(frame[None], each) for frame, each in zip(visual.frames, infos, strict=True)]


def join_tiles(batch: VideoBatch, encoded: Sequence[VisualTokens]) -> list[Piece]:
    """Returns one piece for each visual, and two for an image in tiles.

    Encoded visuals that the batch does not have come last.
    """
    rows = (batch.input_ids == VISUAL_SLOT).nonzero()[:, 0].tolist()
    rest, pieces = iter(encoded), []
    for number, (row, info) in enumerate(zip(rows, batch.infos, strict=True)):
        pieces.append(Piece(next(rest), number, row))  # a whole visual, or a thumbnail
        if tiles := info.tiles:
            parts = torch.cat([next(rest).as_grid() for _ in range(tiles.rows * tiles.columns)])
            plane = rearrange(parts, "(r s) h w d -> 1 (r h) (s w) d", r=tiles.rows)
            tokens = VisualTokens.on_grid(plane, draw=info.draw)
            pieces.append(Piece(tokens, number, row, tiles))
    without_slot = enumerate(rest, len(batch.infos))
    return pieces + [Piece(tokens, number, 0) for number, tokens in without_slot]


def trim(pooled: VisualTokens, tiles: Tiles, newline: Float[Tensor, " m"] | None) -> VisualTokens:
    """Drops the padding tokens of a pooled plane, and ends each row with `newline`.

    The extent is the plane without its padding, and with one more column for the ends of rows.
    """
    before, after = pooled.layout.extent, pooled.grid
    padding = edges(tiles, before.h, before.w)
    top, left = (
        edge * count // size
        for edge, count, size in zip(padding, after[1:], before[1:], strict=True)
    )
    inner = (slice(None), slice(top, after.h - top), slice(left, after.w - left))
    features = pooled.as_grid()[inner]  # 1 h w m
    extent = Grid(1, before.h - 2 * padding[0], before.w - 2 * padding[1])
    places = pooled.layout.coordinates.view(*after, 3)[inner]  # 1 h w 3
    # A window on the edge of the picture may have its middle in the padding.
    last = torch.tensor(extent, device=places.device) - 1
    places = (places - torch.tensor([0, *padding], device=places.device)).clamp(min=0)
    places = places.minimum(last.to(places.dtype))
    if newline is not None:
        ends = newline.to(features.dtype).expand(1, features.shape[1], 1, -1)
        features = torch.cat([features, ends], dim=2)  # 1 h w m -> 1 h w+1 m
        column = torch.full_like(places[:, :, :1, 2:], extent.w)
        places = torch.cat([places, torch.cat([places[:, :, :1, :2], column], dim=-1)], dim=2)
        extent = extent._replace(w=extent.w + 1)
    grid = Grid(*features.shape[:3])
    layout = replace(pooled.layout, coordinates=places.flatten(0, 2), extent=extent)
    return VisualTokens(features.flatten(0, 2), layout, grid)


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
