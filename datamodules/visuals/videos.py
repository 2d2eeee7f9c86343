"""Video bytes -> the wanted frames, decoded, upright and in order.

Frames are chosen by the packet times before decoding. The decoder jumps if a keyframe lies between
the last decoded frame and the wanted one. It skips frames that are neither wanted nor a reference
for others. Jumps and skips never change the result: if a file is not as expected, it is decoded
again with fewer shortcuts.

Each decoder has one thread. The DataLoader workers already run in parallel, and threads inside
them cost more than they gain.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from datamodules.errors import BadSampleError
from datamodules.visuals.container import check_memory, open_video
from datamodules.visuals.images import MAX_PIXELS
from datamodules.visuals.packets import Packets, check_work, scan_packets

_T = TypeVar("_T")

# Codecs that mark frames without references from other frames. (In HEVC, a frame with this mark
# may still be referenced from a higher temporal layer.)
_MARKS_UNREFERENCED = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})

#: Flags of FFmpeg's swscale to resize and convert frames: area averaging (SWS_AREA), and full
#: horizontal colour resolution (SWS_FULL_CHR_H_INT). Without the latter, two neighbouring pixels
#: share a colour, and all channels are two levels too dark.
AREA = 0x20 | 0x2000


class _Way(NamedTuple):
    """A decoding strategy: its shortcuts, and its way to identify frames."""

    skip: bool  # skip frames without references from others
    jump: bool  # jump to keyframes
    count: bool  # identify frames by counting, not by their times


_WAYS = (
    _Way(skip=True, jump=True, count=False),
    _Way(skip=False, jump=True, count=False),
    _Way(skip=False, jump=False, count=False),
    _Way(skip=False, jump=False, count=True),
)


class _InexactError(Exception):
    """Raised if a decoding strategy cannot identify frames with certainty."""


def decode_wanted(
    data: bytes,
    packets: Packets,
    wanted: Sequence[int],
    keep: Callable[[int, VideoFrame], None],
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Decodes the wanted frames.

    Args:
        wanted: numbers of frames, not decreasing.
        keep: called with the number and the frame, once for each different number in order. If
            the video must be decoded again with fewer shortcuts, it starts again at the first.

    Raises:
        BadSampleError: as `scan_packets`.
    """
    targets = sorted(set(wanted))
    for way in _WAYS if packets.stamps else _WAYS[-1:]:
        listed = packets.counted() if way.count else packets
        try:
            with open_video(data, max_pixels) as (container, stream):
                for number, frame in _decoded(container, stream, listed, targets, way):
                    keep(number, frame)
            return
        except _InexactError:
            continue
    raise AssertionError("the last way is exact")


def _decoded(
    container: InputContainer,
    stream: VideoStream,
    packets: Packets,
    targets: Sequence[int],
    way: _Way,
) -> Iterator[tuple[int, VideoFrame]]:
    stamps, keys = packets.stamps, packets.keys if way.jump else []
    needed = None
    if way.skip and stamps and stream.codec_context.name in _MARKS_UNREFERENCED:
        needed = {stamps[target] for target in targets}
    few = len(packets.times) // 10
    frames = enumerate(_frames_of(container, stream, few, needed), start=1)
    at, frame, seen, whole = -math.inf, None, 0, True
    for target in targets:
        stamp = stamps[target] if stamps else target
        nearest = bisect_right(keys, stamp) - 1
        jumped = nearest > 0 and keys[nearest] > at
        if jumped:
            try:
                container.seek(keys[nearest], stream=stream)
            except FFmpegError:
                raise _InexactError from None
            frames = enumerate(_frames_of(container, stream, few, needed), start=1)
            whole = False  # not all frames since the first one were decoded
        while jumped or at < stamp:
            number, following = next(frames, (seen, None))
            if following is None:
                if way.jump:
                    raise _InexactError
                _check_lost(len(packets.times) - seen, packets)
                break  # the last decoded frame replaces the lost frames after it
            before, at, frame, seen = at, following.pts if stamps else number - 1, following, number
            if at is None or (at < before and not jumped):  # the times are wrong
                raise _InexactError
            if jumped and at > stamp:  # seeking is not exact in some formats
                raise _InexactError
            jumped = False
        assert frame is not None
        # An interlaced frame may have its two fields in two packets; one may have been skipped.
        if needed is not None and (at != stamp or frame.interlaced_frame):
            raise _InexactError
        if stamps and whole and at > stamp and not frame.interlaced_frame:
            _check_lost(bisect_left(stamps, at) + 1 - seen, packets)
        yield target, frame


def _check_lost(lost: int, packets: Packets) -> None:
    """Refuses a video if more than a tenth of its frames cannot be decoded."""
    frames = len(packets.times)
    if lost > 0.1 * frames:
        raise BadSampleError("video_truncated", f"{frames - lost} of {frames} frames")


def _frames_of(
    container: InputContainer, stream: VideoStream, few: int, needed: set[int] | None = None
) -> Iterator[VideoFrame]:
    """Yields all frames, or with `needed`, at least those stamps and all reference frames.

    Args:
        few: number of packets that may fail to decode; they are ignored. With `needed` no packet
            may fail, because its damage is visible only if all frames are decoded.
    """
    codec, failed = stream.codec_context, 0
    for packet in container.demux(stream):
        if needed is not None:
            wanted = packet.pts is None or packet.pts in needed
            codec.skip_frame = "DEFAULT" if wanted else "NONREF"
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except FFmpegError:
            if needed is not None:
                raise _InexactError from None
            failed += 1
            if failed > few:
                raise
            continue
        for frame in frames:
            check_memory(codec, frame.width, frame.height, frame.format.padded_bits_per_pixel)
            yield frame


def with_every_frame(
    data: bytes,
    packets: Packets,
    use: Callable[[Iterator[tuple[float, VideoFrame]]], _T],
    max_pixels: int = MAX_PIXELS,
) -> _T:
    """Decodes a whole video.

    Args:
        use: takes all frames in order with their times in seconds, which never decrease. If the
            times in the file decrease, it is called again with counted frames.

    Returns:
        The result of `use`.

    Raises:
        BadSampleError: as `scan_packets`; video_truncated after the last frame, if more than a
            tenth of the frames cannot be decoded.
    """
    check_work(packets, [len(packets.times) - 1], len(data))
    try:
        return use(_every_frame(data, packets, max_pixels))
    except _InexactError:
        return use(_every_frame(data, packets.counted(), max_pixels))


def _every_frame(
    data: bytes, packets: Packets, max_pixels: int
) -> Iterator[tuple[float, VideoFrame]]:
    count, shown, last = 0, -math.inf, len(packets.times) - 1
    with open_video(data, max_pixels) as (container, stream):
        for frame in _frames_of(container, stream, len(packets.times) // 10):
            seconds = None if packets.stamps is None else frame.time
            if seconds is None:
                seconds = packets.times[min(count, last)]
            elif seconds < shown:
                raise _InexactError
            count += 1
            if seconds > shown:
                shown = seconds
                yield seconds, frame
    if not count:
        raise BadSampleError("video_empty", "it has no frame")
    _check_lost(len(packets.times) - count, packets)


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Decodes a whole video and returns the number of its frames; raises as `with_every_frame`."""
    packets = scan_packets(data, max_pixels)
    return with_every_frame(data, packets, lambda frames: sum(1 for _ in frames), max_pixels)


class Turn(NamedTuple):
    """The rotation of a frame for display. Rows and columns are exchanged first."""

    exchanged: bool = False
    mirrored: bool = False  # left and right
    flipped: bool = False  # top and bottom

    def __call__(self, pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Returns a view of the pixels as displayed."""
        turned = pixels.swapaxes(0, 1) if self.exchanged else pixels
        turned = turned[:, ::-1] if self.mirrored else turned
        return turned[::-1] if self.flipped else turned


def turn_of(frame: VideoFrame) -> Turn:
    """Returns the rotation that players apply: phones record in the orientation of their sensor.

    The display matrix maps column x and row y to (a x + c y, b x + d y). Angles are rounded to the
    nearest quarter turn.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Turn()
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(exchanged=True, mirrored=c < 0, flipped=b < 0)
    return Turn(mirrored=a < 0, flipped=d < 0)
