"""Video bytes -> an open container and its video stream, with readable errors.

FFmpeg trusts the claims of a file. This module limits what a video may claim before memory is used.
"""

import ctypes
import gc
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

import av
from av import frame as av_frame
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from datamodules.errors import BadSampleError
from datamodules.visuals.headers import check_claims
from datamodules.visuals.images import MAX_PIXELS, is_image, kind_of

#: Maximum memory in bytes to decode one video. A tiny file can claim any number of large frames.
MAX_BYTES = 2 << 30

# Maximum size of one memory block in FFmpeg: a plane of an 8K frame, or a table of five million
# samples.
_MAX_BLOCK = 128 << 20

# Frames that a decoder holds at once. H.264 and HEVC keep 16 reference frames and current ones.
_FRAMES_HELD, _FRAMES_HELD_INTRA = 20, 2

# Formats that contain their own data. Others (playlists, concatenations, image sequences) name
# files and addresses that the demuxer would open.
_CONTAINER_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,gif",
    "protocol_whitelist": "",
}

# A forked process (a DataLoader worker, a task of `ropelab-shards`) never frees inherited objects:
# an FFmpeg scaler would wait forever for its threads, which a fork does not copy.
os.register_at_fork(after_in_child=gc.freeze)


@contextmanager
def open_video(
    data: bytes, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a container and the video stream that players choose.

    Errors inside the `with` block become a `BadSampleError`.
    """
    if not data:
        raise BadSampleError("video_empty", "0 bytes")
    check_claims(data)
    _limit_blocks()
    # Opening already decodes a few frames, so it needs the limit.
    options = {**_CONTAINER_OPTIONS, "max_pixels": str(max_pixels)}
    with (
        _as_bad_video(data),
        av.open(
            io.BytesIO(data), mode="r", options=options, metadata_errors="replace"
        ) as container,
    ):
        stream = _best_stream(container)
        codec = stream.codec_context
        if codec.width * codec.height > max_pixels:
            size = f"{codec.width} x {codec.height}"
            raise BadSampleError("video_too_large", f"{size}, the limit is {max_pixels} pixels")
        if codec.format is not None:
            bits = codec.format.padded_bits_per_pixel
            check_memory(codec, codec.width, codec.height, bits)
        codec.thread_count = 1
        codec.options = {"max_pixels": str(max_pixels)}  # the size may change within the stream
        yield container, stream


def _best_stream(container: InputContainer) -> VideoStream:
    """Returns the main video track, not a cover picture or a thumbnail track.

    Candidates are the tracks of unknown duration, and those with at least half the duration of the
    longest. FFmpeg chooses among them: the default track first, then the better one.
    """
    tracks = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not tracks:
        raise BadSampleError("not_a_video", "it has no video, or only a cover picture")
    tracks = [stream for stream in tracks if stream.codec_context is not None]
    if not tracks:
        raise BadSampleError("video_unreadable", "its codec is not supported")
    seconds = [_seconds_of(stream) for stream in tracks]
    longest = max((length for length in seconds if length is not None), default=0.0)
    films = [
        stream
        for stream, length in zip(tracks, seconds, strict=True)
        if length is None or length >= 0.5 * longest
    ]
    best = container.streams.best("video")
    return next((film for film in films if film == best), films[0])


def _seconds_of(stream: VideoStream) -> float | None:
    """Returns the duration of a track in seconds, or None if the file does not give it.

    Matroska has no duration in the track header, and libavformat estimates it for some tracks. So
    the tag that writers put at the end, "00:00:04.000000000", has priority.
    """
    tag = next((v for k, v in stream.metadata.items() if k.upper().startswith("DURATION")), "")
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", tag.strip()):
        return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
    return float(stream.duration * (stream.time_base or 0)) if stream.duration else None


def check_memory(codec: VideoCodecContext, width: int, height: int, bits: int) -> None:
    """Refuses a frame size for which a decoder would hold more than `MAX_BYTES`.

    Raises:
        BadSampleError: video_too_large.
    """
    held = _FRAMES_HELD_INTRA if codec.codec.intra_only else _FRAMES_HELD
    if held * width * height * bits > 8 * MAX_BYTES:
        what = f"frames of {width} x {height} pixels of {bits} bits"
        raise BadSampleError(
            "video_too_large",
            f"{what}: a decoder may hold {held} of them, which is too much memory",
        )


@cache
def _limit_blocks() -> None:
    """Sets FFmpeg's maximum size of one memory block. The rest of the process is not limited.

    It calls FFmpeg's own function, found through the libraries that a module of PyAV loads. If
    this fails, `check_claims` still refuses the claims that it knows.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(av_frame.__file__).av_max_alloc(ctypes.c_size_t(_MAX_BLOCK))


@contextmanager
def _as_bad_video(data: bytes) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise BadSampleError(
            "video_too_large", f"it needs more than {_MAX_BLOCK} bytes at once"
        ) from None
    except (FFmpegError, ValueError, ArithmeticError) as error:
        if is_image(data):
            raise BadSampleError("not_a_video", f"it is {kind_of(data)}") from None
        text = getattr(error, "strerror", None) or str(error)
        if kind := kind_of(data):
            text = f"it begins as {kind}: {text}"
        raise BadSampleError("video_unreadable", text) from None
