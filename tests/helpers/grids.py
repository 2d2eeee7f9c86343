"""Grids of patches that a pooler reads, found by asking it."""

from datamodules.batch import Grid
from lightning_modules.pooler.base import Pooler

#: Rows and columns of the encoders in configs/, and a grid that is no square.
_SIDES = [(4, 4), (24, 24), (27, 27), (5, 7)]


def grids_of(pooler: Pooler) -> list[Grid]:
    """Returns a video, an image and a video with an odd number of frames, for each side that fits.

    Raises:
        AssertionError: nothing fits.
    """
    sides = [side for side in _SIDES if fits(pooler, *side)] or [(fitting_side(pooler),) * 2]
    return [Grid(frames, *side) for side in sides for frames in (4, 1, 5)]


def fitting_side(pooler: Pooler) -> int:
    """Returns the smallest number of rows and columns, from 4 on, that the pooler reads.

    Raises:
        AssertionError: it reads no square of up to 32.
    """
    side = next((side for side in range(4, 33) if fits(pooler, side, side)), None)
    assert side, "the pooler reads no video and image of 4 x 4 to 32 x 32 patches"
    return side


def fits(pooler: Pooler, rows: int, columns: int) -> bool:
    """Returns whether the pooler reads videos and images with these patches in a frame."""
    try:
        return all(pooler.extent(Grid(frames, rows, columns)).size > 0 for frames in (4, 1, 5))
    except ValueError:
        return False
