"""The size of frames, as a policy: how a picture of any size becomes what an encoder reads.

    policy   frame                      the picture in it
    Square   side x side                whole, squeezed
    Pad      side x side                whole, in its aspect ratio, centred; the rest has one colour
    Crop     side x side                its middle, in its aspect ratio: CLIP's own preprocessing
    Fixed    height x width             whole, squeezed
    Native   multiples of a factor,     whole, nearly in its aspect ratio: Qwen2-VL's preprocessing
             within limits of pixels

A policy only computes sizes (`Fit`). Pillow's `bicubic` and `nearest` resize images and the frames
of videos; `area` averages, by Pillow's box filter in images and by FFmpeg's swscale in videos.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from datamodules.errors import BadSampleError

Filter = Literal["bicubic", "area", "nearest"]

#: Largest ratio of the sides of a picture: the limit of Qwen2-VL's published code.
MAX_RATIO = 200

#: LLaVA's colour around a picture: the mean colour of CLIP's training images.
CLIP_MEAN = (122, 116, 104)

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}

#: Published: the most pixels of a frame are never less than its least pixels times this.
_SLACK = 1.05


class Fit(NamedTuple):
    """The size of a frame, and where the resized picture lies in it. All numbers are pixels."""

    height: int
    width: int
    inner_height: int  # of the resized picture
    inner_width: int
    top: int = 0  # of the picture in the frame; below 0: that much is cut off
    left: int = 0

    @classmethod
    def whole(cls, height: int, width: int) -> "Fit":
        """Returns the fit of a picture that fills the frame."""
        return cls(height, width, height, width)

    @classmethod
    def centred(cls, height: int, width: int, inner_height: int, inner_width: int) -> "Fit":
        """Returns the fit of a picture whose middle is the middle of the frame."""
        top, left = int((height - inner_height) / 2), int((width - inner_width) / 2)
        return cls(height, width, inner_height, inner_width, top, left)

    def place(
        self, pixels: UInt8[np.ndarray, "h w c"], color: Sequence[int]
    ) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Returns the frame with the resized picture in its place, in rows without gaps."""
        top, left = max(0, -self.top), max(0, -self.left)
        seen = pixels[top : top + self.height, left : left + self.width]
        if seen.shape[:2] == (self.height, self.width):
            return np.ascontiguousarray(seen)
        frame = np.empty((self.height, self.width, 3), np.uint8)
        frame[:] = color
        top, left = max(0, self.top), max(0, self.left)
        frame[top : top + len(seen), left : left + seen.shape[1]] = seen
        return frame


class FramePolicy(ABC):
    """Computes the size of frames from the size of the picture.

    Attributes:
        takes_side: its frames have the side `image_size` of the reader.
        color: red, green and blue of the parts of a frame that no picture covers.
    """

    takes_side = True
    color: tuple[int, ...] = (0, 0, 0)

    @abstractmethod
    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        """Returns the fit of an upright picture.

        Args:
            height, width: of the picture in pixels.
            frames: sampled frames of the visual; 1 for an image.
            side: `image_size` of the reader; 0 for a policy that takes none.

        Raises:
            BadSampleError: aspect_ratio.
        """

    def check_frames(self, most: int) -> None:  # noqa: B027 - most policies have no budget
        """Raises ValueError if a video of this many frames leaves no room for a frame."""


class Square(FramePolicy):
    """Squeezes the whole picture into a square."""

    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        return Fit.whole(side, side)


class Pad(FramePolicy):
    """Keeps the aspect ratio, centres the picture in a square, and fills the rest.

    LLaVA-1.5 fills first and resizes then, so the rows at the picture's edges differ from its own.

    Args:
        color: red, green and blue of the filling, from 0 to 255.
    """

    def __init__(self, color: Sequence[int] = CLIP_MEAN):
        if len(color) != 3 or any(not 0 <= value <= 255 for value in color):
            raise ValueError(
                f"data.frames.policy.color is {list(color)}; set red, green and blue from 0 to 255"
            )
        self.color = tuple(map(int, color))

    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        scale = side / max(height, width)
        inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
        return Fit.centred(side, side, inner_height, inner_width)


class Crop(FramePolicy):
    """Resizes the shorter side to that of the square and keeps the middle of the longer one.

    With the filter `bicubic`, frames equal those of CLIP's image processor in transformers.
    """

    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        check_ratio(height, width)  # the resized picture is that much longer than the frame
        longer = int(side * max(height, width) / min(height, width))
        inner = (longer, side) if height >= width else (side, longer)
        return Fit.centred(side, side, *inner)


class Fixed(FramePolicy):
    """Squeezes the whole picture into one size, such as 252 x 448 of VideoRoPE's needle test."""

    takes_side = False

    def __init__(self, height: int, width: int):
        if min(height, width) < 1:
            raise ValueError(
                f"data.frames.policy is {height} x {width}; set height and width to 1 or more"
            )
        self.height, self.width = height, width

    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        return Fit.whole(self.height, self.width)


class Native(FramePolicy):
    """Keeps aspect ratio and resolution within limits, as Qwen2-VL and VideoRoPE do.

    A frame has at most `max_pixels`, and a video at most `total_pixels` per temporal patch: more
    frames make smaller frames. The least pixels win over this budget, as in the published code.

    Args:
        factor: both sides are multiples of it: patch size times merged patches.
        min_pixels, max_pixels: limits of a frame; a smaller picture is enlarged.
        total_pixels: budget of a video; None: none. A temporal patch of `temporal` frames counts
            once, so Qwen2-VL's 8,000 tokens of 28 x 28 pixels are 6,272,000.
        temporal: frames of a temporal patch of the encoder.
        whole_pixels: True rounds the budget of a frame down, as VideoRoPE's training does; False
            does not, as its evaluation (qwen_vl_utils).
    """

    takes_side = False

    def __init__(
        self,
        factor: int = 28,
        min_pixels: int = 4 * 28 * 28,
        max_pixels: int = 768 * 28 * 28,
        total_pixels: int | None = None,
        temporal: int = 2,
        whole_pixels: bool = False,
    ):
        least = {"factor": factor, "min_pixels": min_pixels, "temporal": temporal}
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"data.frames.policy.{name} is {value}; set it to 1 or more")
        if min_pixels > max_pixels:
            raise ValueError(
                f"data.frames.policy.min_pixels is {min_pixels}, above max_pixels={max_pixels}; "
                "set it to that or less"
            )
        self.factor, self.min_pixels, self.max_pixels = factor, min_pixels, max_pixels
        self.total_pixels, self.temporal, self.whole_pixels = total_pixels, temporal, whole_pixels
        self._check_pixels("max_pixels", max_pixels)
        self.check_frames(1)

    def fit(self, height: int, width: int, frames: int, side: int) -> Fit:
        most = self.most_pixels(frames)
        return Fit.whole(*smart_resize(height, width, self.factor, self.min_pixels, most))

    def most_pixels(self, frames: int) -> int | float:
        """Returns the most pixels of a frame of a visual with this many frames."""
        if self.total_pixels is None:
            return self.max_pixels
        budget = max(self._budget(frames), int(_SLACK * self.min_pixels))
        return min(self.max_pixels, budget)

    def check_frames(self, most: int) -> None:
        if self.total_pixels is not None:
            name = f"total_pixels={self.total_pixels} for {most} frames"
            self._check_pixels(name, self._budget(most))

    def _budget(self, frames: int) -> int | float:
        share = (self.total_pixels or 0) / frames
        return self.temporal * (math.floor(share) if self.whole_pixels else share)

    def _check_pixels(self, name: str, pixels: int | float) -> None:
        if pixels < self.factor**2:
            raise ValueError(
                f"data.frames.policy: {name} leaves {math.floor(pixels)} pixels a frame, less than "
                f"one patch of {self.factor} x {self.factor}; set more of them, or fewer frames"
            )


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int | float
) -> tuple[int, int]:
    """Returns the (height, width) that Qwen2-VL's published code resizes a picture to.

    Each side becomes the nearest multiple of `factor`, half to even. Above `max_pixels` both sides
    shrink alike and are rounded down, below `min_pixels` they grow and are rounded up. A side is at
    least `factor`; the published code of 2024 returns 0 for some narrow pictures.

    Raises:
        BadSampleError: aspect_ratio.
    """
    check_ratio(height, width)
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (
            max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)
        )
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def check_ratio(height: int, width: int) -> None:
    """Refuses a picture that is too narrow to be resized in its aspect ratio."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise BadSampleError(
            "aspect_ratio", f"{width} x {height}: one side is over {MAX_RATIO} times the other"
        )


def check_filter(filter: str | None) -> Filter | None:
    """Returns the word for a filter, or raises ValueError if there is no such filter."""
    if filter is None or filter in get_args(Filter):
        return cast(Filter | None, filter)
    raise ValueError(f"data.frames.filter is {filter}; set bicubic, area or nearest, or null")


def resized(picture: Image.Image, height: int, width: int, filter: Filter) -> Image.Image:
    """Returns an RGB picture in another size."""
    return picture.resize((width, height), _PILLOW[filter])
