"""Any-resolution images in LLaVA-NeXT's layout: a thumbnail, then tiles row by row.

picture                    frames of the size that the encoder reads
+-----------+   squeezed   +---+
|           |  --------->  | 0 |   the thumbnail
|           |              +---+
+-----------+  fitted into +---+---+---+
               the best    | 1 | 2 | 3 |   tiles; parts outside the picture are black
               grid        +---+---+---+
                           | 4 | 5 | 6 |
                           +---+---+---+
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from datamodules.batch import Tiles
from datamodules.visuals.sizes import Filter, resized


def check_grids(grids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Returns (rows, columns) of each grid that a picture may be cut into.

    Raises:
        ValueError: there is no grid, or an entry is not two numbers of 1 or more.
    """
    if not grids or any(len(grid) != 2 or min(grid) < 1 for grid in grids):
        raise ValueError(
            f"data.frames.tiles is {[list(grid) for grid in grids]}; set it to pairs of rows and "
            "columns such as [[1,2],[2,1],[2,2]], or to null for no tiles"
        )
    return [(rows, columns) for rows, columns in grids]


def cut_tiles(
    picture: Image.Image,
    side: int,
    grids: Sequence[tuple[int, int]],
    filter: Filter = "bicubic",
) -> tuple[UInt8[Tensor, "n c h w"], Tiles]:
    """Returns the thumbnail and tiles of an RGB picture, `side` x `side` pixels each."""
    width, height = picture.size
    rows, columns = best_grid(height, width, side, grids)
    plane = Image.new("RGB", (columns * side, rows * side))
    inner_height, inner_width = _fitted(height, width, rows * side, columns * side)
    small = resized(picture, inner_height, inner_width, filter)
    plane.paste(small, ((plane.width - small.width) // 2, (plane.height - small.height) // 2))
    thumbnail = resized(picture, side, side, filter)
    tiles = rearrange(np.array(plane), "(r h) (s w) c -> (r s) c h w", r=rows, s=columns)
    first = rearrange(np.array(thumbnail), "h w c -> 1 c h w")
    return torch.from_numpy(np.concatenate([first, tiles])), Tiles(rows, columns, height, width)


def best_grid(
    height: int, width: int, side: int, grids: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Returns the (rows, columns) that show most of the picture's pixels.

    Ties go to the grid with the fewest unused pixels, then to the first one. Upscaling does not
    count as showing more pixels.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        target_height, target_width = grid[0] * side, grid[1] * side
        scale = min(target_width / width, target_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - target_height * target_width

    return max(grids, key=merit)


def _fitted(height: int, width: int, most_height: int, most_width: int) -> tuple[int, int]:
    """Returns the largest (height, width) that fits, in the picture's aspect ratio."""
    by_width, by_height = most_width / width, most_height / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), most_height), most_width
    return most_height, min(math.ceil(width * by_height), most_width)
