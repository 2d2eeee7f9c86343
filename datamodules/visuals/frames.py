"""Video or image bytes -> sampled, resized frames. The encoder normalises them.

bytes of a video --(videos.py)--> frames --+
                                           +--> upright, `image_size` x `image_size`, uint8 RGB
bytes of an image --(images.py)--> picture +

The whole picture is squeezed into the square, so a wide picture looks narrow. In contrast to the
centre crop of CLIP's own preprocessing, nothing outside the middle square is lost.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from datamodules.batch import Visual, VisualInfo
from datamodules.errors import BadSampleError
from datamodules.visuals.images import MAX_PIXELS, open_image
from datamodules.visuals.packets import check_work, scan_packets
from datamodules.visuals.tiles import check_grids, cut_tiles
from datamodules.visuals.videos import AREA, decode_wanted, turn_of

VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "gif"})
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


class UniformSampler:
    """Samples `num_frames` evenly from first to last frame. A shorter video repeats frames."""

    def __init__(self, num_frames: int):
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; set it to 1 or more")
        self.num_frames = num_frames

    def __call__(self, times: Sequence[float]) -> list[int]:
        return np.linspace(0, len(times) - 1, self.num_frames).round().astype(int).tolist()

    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Returns the number of frames sampled from videos with these frame counts and durations.

        A duration is the time from the first to the last frame, in seconds.
        """
        return np.full(len(frames), self.num_frames)


class FpsSampler:
    """Samples `fps` frames per second of video, between `min_frames` and `max_frames` in total."""

    def __init__(self, fps: float, max_frames: int, min_frames: int = 1):
        if fps <= 0 or not 1 <= min_frames <= max_frames:
            raise ValueError(
                f"fps {fps}, min_frames {min_frames}, max_frames {max_frames}: "
                "set fps above 0 and 1 <= min_frames <= max_frames"
            )
        self.fps, self.max_frames, self.min_frames = fps, max_frames, min_frames

    def __call__(self, times: Sequence[float]) -> list[int]:
        duration = times[-1] - times[0]
        wanted = math.floor(duration * self.fps) + 1
        most = min(self.max_frames, len(times))
        if not self.min_frames <= wanted <= most:
            return UniformSampler(max(min(wanted, most), self.min_frames))(times)
        ticks = times[0] + np.arange(wanted) / self.fps
        after = np.searchsorted(times, ticks).clip(1, max(len(times) - 1, 1))
        nearer = ticks - np.take(times, after - 1) <= np.take(times, after, mode="clip") - ticks
        return (after - nearer).tolist()

    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Returns the same as `UniformSampler.count`, for this sampler."""
        wanted = np.floor(seconds * self.fps).astype(int) + 1
        return np.maximum(np.minimum(wanted, np.minimum(frames, self.max_frames)), self.min_frames)


class FrameReader:
    """Reads a visual as square RGB frames.

    Args:
        image_size: side of a frame in pixels; the whole picture is squeezed into it.
        sampler: takes the times of all frames in seconds and returns the numbers of the wanted
            frames, not decreasing.
        max_pixels: a larger picture is refused before it is decoded.
        tiles: (rows, columns) of the grids that an image may be cut into; None: no tiles.
    """

    def __init__(
        self,
        image_size: int,
        sampler: Callable[[Sequence[float]], list[int]],
        max_pixels: int = MAX_PIXELS,
        tiles: Sequence[Sequence[int]] | None = None,
    ):
        self.image_size, self.sampler, self.max_pixels = image_size, sampler, max_pixels
        self.tiles = None if tiles is None else check_grids(tiles)

    def read(self, name: str, data: bytes) -> Visual:
        """Returns a visual. Its file name suffix decides between video and image.

        Raises:
            BadSampleError: as `video` and `image`; the message begins with the name.
        """
        with naming(name):
            if not is_video(name):
                return self._picture(data)
            frames, seconds = self._sampled(data)
            return Visual(frames, VisualInfo(seconds))

    def video(self, data: bytes) -> UInt8[Tensor, "t c h w"]:
        """Returns the sampled frames of a video.

        Raises:
            BadSampleError: video_unreadable, video_empty, video_truncated, video_too_large,
                not_a_video.
        """
        return self._sampled(data)[0]

    def _sampled(self, data: bytes) -> tuple[UInt8[Tensor, "t c h w"], tuple[float, ...]]:
        """Returns the sampled frames of a video, and the time of each in seconds."""
        packets = scan_packets(data, self.max_pixels)
        wanted = np.asarray(self.sampler(packets.times))
        check_work(packets, wanted.tolist(), len(data))
        frames: Tensor | None = None
        scaler = VideoReformatter()  # reused for all frames: creating one costs more than its work

        def keep(number: int, frame: VideoFrame) -> None:
            nonlocal frames
            pixels = torch.from_numpy(self._shown(frame, scaler)).permute(2, 0, 1)  # -> c h w
            if frames is None:
                frames = pixels.new_empty(len(wanted), *pixels.shape)
            start, end = np.searchsorted(wanted, [number, number + 1])
            frames[start:end] = pixels  # the only copy of a frame that is kept

        decode_wanted(data, packets, wanted.tolist(), keep, self.max_pixels)
        assert frames is not None
        return frames, tuple(float(packets.times[number]) for number in wanted)

    def image(self, data: bytes) -> UInt8[Tensor, "t c h w"]:
        """Returns an image as one frame.

        Raises:
            BadSampleError: image_unreadable, image_too_large.
        """
        picture = open_image(data, self.max_pixels)
        height, width = self._size(picture.height, picture.width)
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()  # h w c -> 1 c h w

    def _picture(self, data: bytes) -> Visual:
        """Returns an image as one frame, or as a thumbnail and tiles. Raises as `image`."""
        if self.tiles is None:
            return Visual(self.image(data))
        picture = open_image(data, self.max_pixels)
        frames, tiles = cut_tiles(picture, self.image_size, self.tiles)
        return Visual(frames, VisualInfo(tiles=tiles))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) of frames for a displayed picture of this size.

        Only this method decides the size, so all frames of a visual have the same one.
        """
        return self.image_size, self.image_size

    def _shown(self, frame: VideoFrame, scaler: VideoReformatter) -> UInt8[np.ndarray, "h w c"]:
        """Returns a video frame, rotated for display and resized."""
        turn = turn_of(frame)
        shown = (frame.width, frame.height) if turn.exchanged else (frame.height, frame.width)
        size = self._size(*shown)
        height, width = size[::-1] if turn.exchanged else size
        small = scaler.reformat(frame, width, height, "rgb24", interpolation=AREA, **one_thread())
        return np.ascontiguousarray(turn(small.to_ndarray()))


def is_video(name: str) -> bool:
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Adds a file name to the start of the messages of `BadSampleError`."""
    try:
        yield
    except BadSampleError as error:
        detail = f"{name}: {error.detail}" if error.detail else name
        raise BadSampleError(error.reason, detail, shard=error.shard, key=error.key) from None


@cache
def one_thread() -> dict[str, Any]:
    """Returns the argument that stops a scaler from starting threads, if this PyAV has it."""
    try:
        VideoReformatter().reformat(VideoFrame(2, 2, "gray"), 4, 4, threads=1)
    except TypeError:
        return {}
    return {"threads": 1}
