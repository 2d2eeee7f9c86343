"""Encodes videos for shards: small H.264 with frequent keyframes and no B-frames."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import numpy as np
from av import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from datamodules.errors import BadSampleError
from datamodules.visuals.frames import one_thread
from datamodules.visuals.images import open_image
from datamodules.visuals.packets import scan_packets
from datamodules.visuals.videos import AREA, turn_of, with_every_frame

#: Frames per second of a video that is a folder of frames, as in LLaVA-Hound.
FOLDER_FPS = 2

_UNIT = Fraction(1, 90_000)  # time unit in seconds
_PRECISE = AREA | 0x4000 | 0x40000  # SWS_FULL_CHR_H_INP, SWS_ACCURATE_RND
_MATRIX = 1  # BT.709, in FFmpeg's AVColorSpace

# Maximum ticks between two frames in FFmpeg's MP4 writer. It shortens larger steps.
_MOST_TICKS = (1 << 31) - 1

Span = tuple[float, float]  # start (included) and end (excluded) in seconds
Frames = Iterable[tuple[float, VideoFrame]]  # (display time in seconds, frame)


def reencode(data: bytes, short_side: int, span: Span | None = None, gop: int = 8) -> bytes:
    """Encodes a video, or the part in `span`, for fast random access.

    Raises:
        BadSampleError: as `with_every_frame`; video_empty if the span shows no frame.
    """
    packets = scan_packets(data)

    def encode(frames: Frames) -> bytes:
        part = _part(frames, span, packets.last, packets.origin)
        return _encode(part, short_side, gop, packets.rate)

    return with_every_frame(data, packets, encode)


def encode_frames(
    pictures: Iterable[bytes], short_side: int | None, span: Span | None = None, gop: int = 8
) -> bytes:
    """Encodes images as H.264 with `FOLDER_FPS` frames per second.

    Raises:
        BadSampleError: as `open_image`; video_empty if the span shows no frame.
    """

    def frames() -> Iterator[tuple[float, VideoFrame]]:
        for number, data in enumerate(pictures):
            try:
                picture = open_image(data)
            except BadSampleError as error:
                detail = f"frame {number + 1} of the folder: {error.detail}"
                raise BadSampleError(error.reason, detail) from None
            yield number / FOLDER_FPS, VideoFrame.from_image(picture)

    part = _part(frames(), span, 1 / FOLDER_FPS, origin=0.0)
    return _encode(part, short_side, gop, Fraction(FOLDER_FPS))


def _part(
    frames: Frames, span: Span | None, last: float, origin: float
) -> Iterator[tuple[float, VideoFrame]]:
    """Yields the frames that begin within the span, with times that start at 0.

    If no frame begins in the span, it yields the frame that is displayed at its start.

    Args:
        last: seconds for which the last frame is shown.
        origin: the time that the span is relative to.
    """
    start, end = span or (-math.inf, math.inf)
    first = before = None
    at = 0.0
    for seconds, frame in frames:
        at = round(seconds - origin, 6)  # microseconds, so that 3.2 - 0.2 is 3
        if start <= at < end:
            first = seconds if first is None else first
            yield seconds - first, frame
        elif at < start:
            before = frame
    if first is None and before is not None and start < at + last:
        yield 0.0, before


def _encode(frames: Frames, short_side: int | None, gop: int, rate: Fraction) -> bytes:
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise BadSampleError("video_empty", "it has no frame")
    size = _even_size(first[1], short_side)
    options = {"movflags": "faststart"}  # requires a file that can be opened twice
    with (
        NamedTemporaryFile(suffix=".mp4") as file,
        av.open(file.name, "w", format="mp4", options=options) as target,
    ):
        stream = target.add_stream("libx264", rate=rate)
        stream.options = {"g": str(gop), "bf": "0", "threads": "1", "crf": "20"}
        stream.pix_fmt, (stream.width, stream.height) = "yuv420p", size
        codec = stream.codec_context
        codec.time_base = _UNIT
        codec.colorspace, codec.color_range = _MATRIX, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        ticks = 0
        for seconds, frame in chain([first], frames):
            before, ticks = ticks, round(seconds / _UNIT)
            if ticks - before > _MOST_TICKS:
                gap = f"{float((ticks - before) * _UNIT):.0f} s without a frame"
                raise BadSampleError("video_unreadable", gap)
            small = _as_bt709(frame, *size)
            small.pts, small.time_base = ticks, _UNIT
            target.mux(stream.encode(small))
        target.mux(stream.encode())
        target.close()
        return Path(file.name).read_bytes()


def _as_bt709(frame: VideoFrame, width: int, height: int) -> VideoFrame:
    """Returns a frame rotated for display, with this size, in BT.709.

    The conversion goes through RGB, so a reader gets the same colours as from the source. The
    source may have any colour matrix, range and depth, and may not name them.
    """
    turn = turn_of(frame)
    if turn.exchanged:
        width, height = height, width
    small = frame.reformat(width, height, "rgb24", interpolation=AREA, **one_thread()).to_ndarray()
    shown = VideoFrame.from_ndarray(np.ascontiguousarray(turn(small)), format="rgb24")
    return shown.reformat(
        format="yuv420p",
        interpolation=_PRECISE,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        **one_thread(),
    )


def _even_size(frame: VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Returns the even (width, height) of the encoded frame, rotated for display."""
    scale = min(1.0, (short_side or math.inf) / min(frame.width, frame.height))
    width, height = (max(2, round(n * scale / 2) * 2) for n in (frame.width, frame.height))
    return (height, width) if turn_of(frame).exchanged else (width, height)
