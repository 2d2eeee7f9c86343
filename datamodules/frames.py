"""Video or image bytes -> sampled, resized frames. Normalising them is the encoder's part.

One thread a decoder: the DataLoader's workers are the parallelism, and threads inside them cost
more than they give. Frames are chosen from the packets' times before anything is decoded; the
decoder then jumps where a keyframe lies between where it stands and the frame wanted.
"""

import io
import math
import resource
import struct
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from datamodules.batch import BadSampleError, Tiles
from datamodules.tiles import check_grids, cut_tiles

VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "gif"})
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})

#: Pixels of the largest frame that is decoded: 8K video.
MAX_PIXELS = 7680 * 4320

#: Bytes that reading one visual may add to the process. Kilobytes can claim any number of frames.
MAX_BYTES = 2 << 30

# Pixels that may be decoded to reach the frames wanted: as many for any file, and more for each of
# its bytes. Films stay far below; kilobytes that claim hours of large frames do not.
_PIXELS_ANY, _PIXELS_A_BYTE = 20_000_000_000, 5_000
_JPEG_SCANS = 200  # a progressive picture has about ten, and each is a pass over all of it

# Formats that hold their own data. Others (playlists, concatenations, image sequences) name files
# and addresses that the demuxer would open.
_CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,gif",
    "protocol_whitelist": "",
}
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


class UniformSampler:
    """`num_frames` evenly from the first frame to the last; a shorter video repeats frames."""

    def __init__(self, num_frames: int):
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; set it to 1 or more")
        self.num_frames = num_frames

    def __call__(self, times: Sequence[float]) -> list[int]:
        return np.linspace(0, len(times) - 1, self.num_frames).round().astype(int).tolist()

    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """How many it takes of videos of so many frames, of so long from the first to the last."""
        return np.full(len(frames), self.num_frames)


class FpsSampler:
    """`fps` frames for each second of video, within `min_frames` and `max_frames`."""

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
        """As `UniformSampler.count`."""
        wanted = np.floor(seconds * self.fps).astype(int) + 1
        return np.maximum(np.minimum(wanted, np.minimum(frames, self.max_frames)), self.min_frames)


class FrameReader:
    """Reads a visual as square RGB frames.

    Args:
        image_size: side of a frame; the whole picture is squeezed into it.
        sampler: times of all frames, in seconds -> numbers of those wanted, not decreasing.
        max_pixels: a larger picture is refused before it is decoded.
        tiles: (rows, columns) of the grids that `picture` may cut an image into; None: none.
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

    def video(self, data: bytes) -> UInt8[Tensor, "t c h w"]:
        """Sampled frames.

        Raises:
            BadSampleError: video_unreadable, video_empty, video_truncated, video_too_large,
                not_a_video.
        """
        packets = _scan_packets(data, self.max_pixels)
        wanted = self.sampler(packets.times)
        _check_work(packets, wanted, len(data))
        try:
            frames = self._frames(data, packets, wanted)
        except _JumpedTooFarError:
            frames = self._frames(data, replace(packets, keys=[]), wanted)
        stacked = torch.from_numpy(np.stack([frames[n] for n in wanted]))
        return stacked.permute(0, 3, 1, 2).contiguous()  # t h w c -> t c h w

    def image(self, data: bytes) -> UInt8[Tensor, "t c h w"]:
        """One frame.

        Raises:
            BadSampleError: image_unreadable, image_too_large.
        """
        picture = open_image(data, self.max_pixels)
        size = (self.image_size, self.image_size)
        pixels = np.array(picture.resize(size, Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()  # h w c -> 1 c h w

    def read(self, name: str, data: bytes) -> tuple[UInt8[Tensor, "n c h w"], Tiles | None]:
        """Frames of a visual by the ending of its name; raises as `video` and `picture`."""
        return (self.video(data), None) if is_video(name) else self.picture(data)

    def picture(self, data: bytes) -> tuple[UInt8[Tensor, "n c h w"], Tiles | None]:
        """An image as one frame, or as a thumbnail and tiles; raises as `image`."""
        if self.tiles is None:
            return self.image(data), None
        return cut_tiles(open_image(data, self.max_pixels), self.image_size, self.tiles)

    def _frames(
        self, data: bytes, packets: "_Packets", wanted: Sequence[int]
    ) -> dict[int, np.ndarray]:
        decoded = _decode(data, packets, wanted, self.max_pixels)
        with _as_bad_video(data):
            return {number: self._resize(frame) for number, frame in decoded}

    def _resize(self, frame: VideoFrame) -> np.ndarray:
        small = frame.reformat(
            width=self.image_size, height=self.image_size, format="rgb24", interpolation="AREA"
        )
        return upright(small.to_ndarray(), frame)


def is_video(name: str) -> bool:
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


def frame_times(data: bytes) -> list[float]:
    """Seconds of all frames of a video, without decoding one; raises as `FrameReader.video`."""
    return _scan_packets(data, MAX_PIXELS).times


def upright(pixels: UInt8[np.ndarray, "h w c"], frame: VideoFrame) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Pixels of a frame as its player would show them: phones record turned by 90 degrees."""
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90)))


@dataclass(frozen=True)
class _Packets:
    """Frames as the container lists them, in order of display."""

    times: list[float]  # seconds
    stamps: list[int] | None  # in units of the stream; None: there are none, so count instead
    keys: list[int]  # stamps at which decoding can start
    pixels: int  # of a frame


class _JumpedTooFarError(Exception):
    """The container was sought, and came out behind the frame wanted."""


def _scan_packets(data: bytes, max_pixels: int) -> _Packets:
    """Reads the list of frames without decoding one."""
    with open_video(data, max_pixels) as container:
        stream = container.streams.video[0]
        found, cut = [], False  # not the packets themselves: they hold the whole file once more
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                found.append((packet.pts, packet.is_keyframe))
                cut = packet.is_corrupt
            if len(found) > len(data):
                raise BadSampleError("video_too_large", f"over {len(data)} frames in as many bytes")
        if not found:
            raise BadSampleError("video_empty", "no frame in it")
        stamps = sorted(stamp for stamp, _ in found if stamp is not None)
        unit, rate = float(stream.time_base or 1), float(stream.average_rate or 25)
        pixels = stream.codec_context.width * stream.codec_context.height
        if len(set(stamps)) < len(found):
            packets = _Packets([n / rate for n in range(len(found))], None, [], pixels)
        else:
            keys = sorted(stamp for stamp, is_key in found if is_key and stamp is not None)
            packets = _Packets([stamp * unit for stamp in stamps], stamps, keys, pixels)
        _check_whole(container, packets.times, cut)
        return packets


def _check_whole(container: InputContainer, times: list[float], cut: bool) -> None:
    """Of a file that was cut, not all is there that its head declares."""
    declared = container.streams.video[0].frames
    if cut or len(times) < 0.9 * declared:
        raise BadSampleError("video_truncated", f"{len(times)} of {declared} frames")
    seconds = (container.duration or 0) / av.time_base
    alone = len(container.streams) == 1  # a soundtrack may be longer than its video
    if alone and times[-1] - times[0] < 0.9 * seconds - 1:
        raise BadSampleError("video_truncated", f"{times[-1]:.1f} of {seconds:.1f} s")


def _check_work(packets: _Packets, wanted: Sequence[int], size: int) -> None:
    """Refuses what would take minutes, before it does. Counted and not timed, so that the verdict
    is the same on every machine."""
    stamps = packets.stamps or []
    starts = [bisect_left(stamps, key) for key in packets.keys] or [0]
    frames = at = 0
    for number in sorted(set(wanted)):
        at = max(at, starts[max(bisect_right(starts, number) - 1, 0)])
        frames, at = frames + max(number + 1 - at, 0), number + 1
    pixels, limit = frames * packets.pixels, _PIXELS_ANY + _PIXELS_A_BYTE * size
    if pixels > limit:
        what = f"{frames} frames of {packets.pixels} pixels to decode out of {size} bytes"
        raise BadSampleError(
            "video_too_large", f"{what}, the limit is {limit / packets.pixels:.0f}"
        )


def _decode(
    data: bytes, packets: _Packets, wanted: Sequence[int], max_pixels: int
) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) for every different number wanted, which do not decrease."""
    with open_video(data, max_pixels) as container:
        stream = container.streams.video[0]
        frames = enumerate(container.decode(stream))
        at, frame = -math.inf, None
        for target in sorted(set(wanted)):
            stamp = packets.stamps[target] if packets.stamps else target
            nearest = bisect_right(packets.keys, stamp) - 1
            jumped = nearest > 0 and packets.keys[nearest] > at
            if jumped:
                try:
                    container.seek(packets.keys[nearest], stream=stream)
                except FFmpegError:
                    raise _JumpedTooFarError from None
                frames = enumerate(container.decode(stream))
            while jumped or at < stamp:
                number, frame = next(frames, (-1, None))
                if frame is None:
                    raise BadSampleError("video_truncated", f"it ends before frame {target}")
                at = frame.pts if packets.stamps and frame.pts is not None else number
                if jumped and at > stamp:  # some formats seek only roughly
                    raise _JumpedTooFarError
                jumped = False
            assert frame is not None
            yield target, frame


@contextmanager
def open_video(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[InputContainer]:
    """A container with at least one video stream; what fails inside becomes a `BadSampleError`."""
    if not data:
        raise BadSampleError("video_empty", "0 bytes")
    # Opening decodes a few frames too, so the limit has to be known before.
    options = {**_CONTAINER_OPTIONS, "max_pixels": str(max_pixels)}
    with (
        _as_bad_video(data),
        _memory_limit(),
        av.open(
            io.BytesIO(data), mode="r", options=options, metadata_errors="replace"
        ) as container,
    ):
        if not container.streams.video:
            raise BadSampleError("not_a_video", "no picture in it")
        codec = container.streams.video[0].codec_context
        if codec is None:
            raise BadSampleError("video_unreadable", "a codec that is not known")
        if codec.width * codec.height > max_pixels:
            size = f"{codec.width} x {codec.height}"
            raise BadSampleError("video_too_large", f"{size}, the limit is {max_pixels} pixels")
        codec.thread_count = 1
        codec.options = {"max_pixels": str(max_pixels)}  # as the size may change on the way
        yield container


@contextmanager
def _as_bad_video(data: bytes) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise BadSampleError("video_too_large", f"it takes over {MAX_BYTES} bytes") from None
    except (FFmpegError, ValueError, ArithmeticError) as error:
        if _is_image(data):
            raise BadSampleError("not_a_video", "it is an image") from None
        text = getattr(error, "strerror", None) or str(error)
        raise BadSampleError("video_unreadable", text) from None


_DATA_LIMIT = resource.getrlimit(resource.RLIMIT_DATA)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Lets the process grow by `MAX_BYTES` and no further, where the system counts that (Linux).

    FFmpeg allocates what a file's tables claim, and has no limit of its own for it.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        yield
        return
    soft, hard = _DATA_LIMIT
    limit = pages * resource.getpagesize() + MAX_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, _DATA_LIMIT)


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Decodes a whole video.

    Raises:
        BadSampleError: as `FrameReader.video`.
    """
    packets = _scan_packets(data, max_pixels)
    _check_work(packets, [len(packets.times) - 1], len(data))
    with open_video(data, max_pixels) as container:
        count = sum(1 for _ in container.decode(container.streams.video[0]))
    if not count:
        raise BadSampleError("video_empty", "no frame in it")
    if count < 0.9 * len(packets.times):
        raise BadSampleError("video_truncated", f"{count} of {len(packets.times)} frames")
    return count


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB picture, upright; raises as `FrameReader.image`."""
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > _JPEG_SCANS:
        raise BadSampleError("image_too_large", f"{scans} scans, the limit is {_JPEG_SCANS}")
    try:
        with warnings.catch_warnings(), _memory_limit():
            warnings.simplefilter("ignore")  # of damaged metadata; the size is checked here
            # Named formats only: Pillow has others that start programs.
            picture = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise BadSampleError("image_too_large", f"{width} x {height}")
            return _turned(picture).convert("RGB")
    except BadSampleError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise BadSampleError("image_too_large", str(error)) from None
    except Exception as error:  # Pillow's readers of broken files raise nearly anything
        text = str(error).split("<")[0].strip()
        raise BadSampleError("image_unreadable", f"{type(error).__name__}: {text}") from None


def _turned(picture: Image.Image) -> Image.Image:
    """As its camera was held. Metadata that cannot be read leave a good picture as it is."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except (ValueError, TypeError, KeyError, SyntaxError, struct.error):
        return picture


def _is_image(data: bytes) -> bool:
    try:
        open_image(data, MAX_PIXELS)
    except BadSampleError:
        return False
    return True
