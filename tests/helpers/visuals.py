"""Makes the visual fields of batches, and compares rows of visuals and text."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from datamodules.batch import Grid, Tiles, Visual, VisualInfo, visual_fields
from lightning_modules.tokens import Layout, Row


def visuals_of(
    frames: Tensor, counts: Sequence[int], tiles: Sequence[Tiles | None] = ()
) -> list[Visual]:
    """Returns visuals of `counts` frames each, cut from the frames of all."""
    tiles = tiles or [None] * len(counts)
    return [
        Visual(part, VisualInfo(tiles=each))
        for part, each in zip(frames.split(list(counts)), tiles, strict=True)
    ]


def frames_of(
    frames: Tensor, counts: Sequence[int], tiles: Sequence[Tiles | None] = ()
) -> dict[str, Any]:
    """Returns the fields of a `VideoBatch` with these visuals."""
    return visual_fields(visuals_of(frames, counts, tiles), frames.flatten()[:0])


def row_of(*segments: int | Grid) -> list[int | Layout]:
    """Returns a row in which each visual fills its grid."""
    return [Layout.full(s) if isinstance(s, Grid) else s for s in segments]


def outline(row: Row) -> list[Any]:
    """Returns a row as plain values: a number of text tokens, or (extent, coordinates)."""
    return [
        (segment.extent, segment.coordinates.tolist()) if isinstance(segment, Layout) else segment
        for segment in row
    ]
