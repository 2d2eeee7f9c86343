"""Video or image bytes -> sampled, resized frames. The encoder normalises them.

bytes of a video --(videos.py)--> frames --+
                                           +--(sizes.py)--> upright, of one size, uint8 RGB
bytes of an image --(images.py)--> picture +

A policy of `sizes.py` decides the size. By default the whole picture is squeezed into a square.
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
from datamodules.visuals.sizes import Filter, Fit, FramePolicy, Square, check_filter, resized
from datamodules.visuals.tiles import check_grids, cut_tiles
from datamodules.visuals.videos import AREA, decode_wanted, turn_of

VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "gif"})
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})

_NEARLY = 1e-3  # frames; times in a file are rounded, so 10 seconds may be 9.9997


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


class SpacedSampler:
    """Spaces frames evenly from first to last, `fps` for each second, as Qwen2-VL and VideoRoPE do.

    A multiple of `factor` frames is taken: of those that the video has, or its frames are repeated
    if it has fewer than `factor`. The published training code takes none of a video under one
    second, and the published evaluation refuses it.

    Args:
        fps: frames for each second. A video lasts from its first frame to the end of its last.
        max_frames, min_frames: limits of the number; the largest and the least multiple of `factor`
            within them count.
        factor: divides the number of frames: frames of a temporal patch of the encoder.
        rounding: how the number of frames and the number of each become whole: `truncate` as in
            VideoRoPE's training, `round` (half to even) as in its evaluation.
    """

    def __init__(
        self,
        fps: float,
        max_frames: int,
        min_frames: int = 1,
        factor: int = 2,
        rounding: str = "truncate",
    ):
        self.fps, self.factor, self.rounding = fps, factor, rounding
        self.max_frames, self.min_frames = max_frames, min_frames
        if fps <= 0 or factor < 1 or not 1 <= min_frames <= max_frames:
            raise ValueError(
                f"fps {fps}, factor {factor}, min_frames {min_frames}, max_frames {max_frames}: "
                "set fps above 0, factor to 1 or more and 1 <= min_frames <= max_frames"
            )
        if self._up(min_frames) > self._down(max_frames):
            raise ValueError(
                f"no multiple of factor={factor} lies between min_frames={min_frames} and "
                f"max_frames={max_frames}; set them further apart"
            )
        if rounding not in ("truncate", "round"):
            raise ValueError(f"rounding is {rounding}; set truncate or round")

    def __call__(self, times: Sequence[float]) -> list[int]:
        seconds = np.asarray([times[-1] - times[0]])
        number = int(self.count(np.asarray([len(times)]), seconds)[0])
        spaced = np.linspace(0, len(times) - 1, number)
        return (spaced.round() if self.rounding == "round" else spaced).astype(int).tolist()

    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Returns the same as `UniformSampler.count`, for this sampler."""
        lasts = seconds * frames / np.maximum(frames - 1, 1)  # the last frame is shown, too
        wanted = np.minimum(lasts * self.fps, self.max_frames)
        nearest = wanted.round()
        wanted = np.where(np.abs(wanted - nearest) < _NEARLY, nearest, wanted)
        wanted = np.maximum(wanted, self._up(self.min_frames))
        wanted = np.minimum(wanted, self._down(np.minimum(frames, self.max_frames)))
        multiples = wanted / self.factor
        whole = multiples.round() if self.rounding == "round" else np.floor(multiples)
        return np.maximum(whole.astype(int), 1) * self.factor

    def _up(self, number: int) -> int:
        return -(-number // self.factor) * self.factor

    def _down(self, number: Any) -> Any:
        return number // self.factor * self.factor


class FrameReader:
    """Reads a visual as RGB frames of one size.

    Args:
        image_size: side of a frame in pixels; None if the policy takes none.
        sampler: takes the times of all frames in seconds and returns the numbers of the wanted
            frames, not decreasing.
        max_pixels: a larger picture is refused before it is decoded.
        tiles: (rows, columns) of the grids that an image may be cut into; None: no tiles.
        policy: decides the size of frames; None: `Square`.
        filter: `bicubic`, `area` or `nearest`; None: images by `bicubic`, video frames by `area`.
    """

    policy: FramePolicy = Square()
    filter: Filter | None = None

    def __init__(
        self,
        image_size: int | None,
        sampler: Callable[[Sequence[float]], list[int]],
        max_pixels: int = MAX_PIXELS,
        tiles: Sequence[Sequence[int]] | None = None,
        policy: FramePolicy | str | None = None,
        filter: str | None = None,
    ):
        self.image_size, self.sampler, self.max_pixels = image_size, sampler, max_pixels
        self.tiles = None if tiles is None else check_grids(tiles)
        if isinstance(policy, str):
            raise ValueError(
                f"data.frames.policy is {policy}; choose one by data/frames=square, pad, crop, "
                "fixed or native, or set null for squares"
            )
        # Attributes describe the frames of scores. Defaults leave the description as it always was.
        if policy is not None:
            self.policy = policy
        if filter is not None:
            self.filter = check_filter(filter)
        self._check()

    def _check(self) -> None:
        name = type(self.policy).__name__
        if self.policy.takes_side != (self.image_size is not None):
            fitting = "the side of a frame in pixels, or choose data/frames=native"
            fitting = fitting if self.policy.takes_side else "null"
            shown = "null" if self.image_size is None else self.image_size
            raise ValueError(
                f"data.frames.image_size is {shown} with {name} frames; set it to {fitting}"
            )
        if self.tiles is not None and not isinstance(self.policy, Square):
            raise ValueError(
                f"data.frames.tiles are cut for square frames, not for {name} frames; choose "
                "data/frames=square, or set data.frames.tiles=null"
            )
        most = getattr(self.sampler, "num_frames", getattr(self.sampler, "max_frames", None))
        if most is not None:
            self.policy.check_frames(most)

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
            size = None if frames is None else (frames.shape[2], frames.shape[3])
            shown = self._shown(frame, scaler, len(wanted), size)
            pixels = torch.from_numpy(shown).permute(2, 0, 1)  # h w c -> c h w
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
        fit = self._fit(picture.height, picture.width, 1)
        small = resized(picture, fit.inner_height, fit.inner_width, self.filter or "bicubic")
        pixels = fit.place(np.array(small), self.policy.color)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()  # h w c -> 1 c h w

    def _picture(self, data: bytes) -> Visual:
        """Returns an image as one frame, or as a thumbnail and tiles. Raises as `image`."""
        if self.tiles is None or self.image_size is None:
            return Visual(self.image(data))
        picture = open_image(data, self.max_pixels)
        frames, tiles = cut_tiles(picture, self.image_size, self.tiles, self.filter or "bicubic")
        return Visual(frames, VisualInfo(tiles=tiles))

    def _fit(self, height: int, width: int, frames: int) -> Fit:
        """Returns the fit of a picture of this size, in a visual of this many frames."""
        return self.policy.fit(height, width, frames, self.image_size or 0)

    def _shown(
        self,
        frame: VideoFrame,
        scaler: VideoReformatter,
        frames: int,
        size: tuple[int, int] | None,
    ) -> UInt8[np.ndarray, "h w c"]:
        """Returns a video frame, rotated for display and resized.

        Args:
            frames: sampled frames of the video.
            size: (height, width) of its first frame, which the others must have.
        """
        turn = turn_of(frame)
        shown = (frame.width, frame.height) if turn.exchanged else (frame.height, frame.width)
        fit = self._fit(*shown, frames)
        if size is not None and (fit.height, fit.width) != size:
            fit = Fit.whole(*size)  # the size of the picture changes within some videos
        inner = (fit.inner_height, fit.inner_width)
        if self.filter is None or self.filter == "area":
            height, width = inner[::-1] if turn.exchanged else inner
            pixels = turn(averaged(frame, height, width, scaler))
        else:  # Pillow resizes the upright picture: its result depends on which side comes first
            whole = turn(averaged(frame, frame.height, frame.width, scaler))
            picture = Image.fromarray(np.ascontiguousarray(whole))
            pixels = np.array(resized(picture, *inner, self.filter))
        return fit.place(pixels, self.policy.color)


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


def averaged(
    frame: VideoFrame, height: int, width: int, scaler: VideoReformatter
) -> UInt8[np.ndarray, "h w c"]:
    """Returns the RGB pixels of a video frame, resized by area averaging."""
    small = scaler.reformat(frame, width, height, "rgb24", interpolation=AREA, **one_thread())
    return small.to_ndarray()


@cache
def one_thread() -> dict[str, Any]:
    """Returns the argument that stops a scaler from starting threads, if this PyAV has it."""
    try:
        VideoReformatter().reformat(VideoFrame(2, 2, "gray"), 4, 4, threads=1)
    except TypeError:
        return {}
    return {"threads": 1}
