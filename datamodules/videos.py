"""Video bytes -> the decoded frames that are wanted, upright and in their order.

Frames are chosen from the times of the packets before anything is decoded. The decoder then jumps
where a keyframe lies between where it stands and the frame wanted, and leaves out frames that
neither are wanted nor help to decode another. What comes out never depends on either: wherever a
file is not as expected, it is decoded again in a plainer way.

One thread a decoder: the DataLoader's workers are the parallelism, and threads inside them cost
more than they give.
"""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from datamodules.batch import BadSampleError
from datamodules.container import check_memory, open_video
from datamodules.headers import missing_bytes
from datamodules.images import MAX_PIXELS

# Pixels that may be decoded to reach the frames wanted: as many for any file, and more for each of
# its bytes. Films stay far below; kilobytes that claim hours of large frames do not.
_PIXELS_ANY, _PIXELS_A_BYTE = 20_000_000_000, 5_000

# Codecs that mark frames to which no other frame refers. (In HEVC such a frame may still be
# referred to from a higher temporal layer.)
_MARKS_UNREFERENCED = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})

_NO_TIME = -(1 << 63)

#: How frames are resized and converted, as flags of FFmpeg's swscale: the mean of the pixels that
#: become one (SWS_AREA), and a colour of its own for every pixel (SWS_FULL_CHR_H_INT). Without the
#: latter two neighbours share one, and all channels are two levels too dark.
AREA = 0x20 | 0x2000


@dataclass(frozen=True)
class Packets:
    """The frames of a video as its container lists them, in the order in which they are shown.

    Attributes:
        times: seconds.
        stamps: the same in units of the stream; None where the container's times do not tell
            which frame is which, so that frames are counted as they come out of the decoder.
        keys: stamps at which decoding can start.
        pixels: of one frame.
        rate: frames per second, on average.
        last: seconds for which the last frame is shown.
    """

    times: list[float]
    stamps: list[int] | None
    keys: list[int]
    pixels: int
    rate: Fraction
    last: float = 0.0


class _Way(NamedTuple):
    """How a video is decoded: what may be left out."""

    skip: bool  # frames that no other refers to
    jump: bool  # to keyframes


_WAYS = (_Way(skip=True, jump=True), _Way(skip=False, jump=True), _Way(skip=False, jump=False))


class _InexactError(Exception):
    """This way does not show for certain which frame is which."""


def scan_packets(data: bytes, max_pixels: int = MAX_PIXELS) -> Packets:
    """Lists the frames of a video without decoding one.

    Raises:
        BadSampleError: video_unreadable, video_empty, video_truncated, video_too_large,
            not_a_video.
    """
    with open_video(data, max_pixels) as (container, stream):
        # Numbers, not the packets themselves: these hold the whole file once more.
        pts, dts, lasts, keys = array("q"), array("q"), array("q"), array("b")
        hidden, cut = 0, False
        for packet in container.demux(stream):
            if not packet.size:
                continue
            cut = packet.is_corrupt
            if packet.is_discard:  # decoded for the frames that follow, and never shown
                hidden += 1
            else:
                pts.append(_NO_TIME if packet.pts is None else packet.pts)
                dts.append(_NO_TIME if packet.dts is None else packet.dts)
                lasts.append(packet.duration or 0)
                keys.append(packet.is_keyframe)
            if len(pts) + hidden > len(data):
                raise BadSampleError("video_too_large", f"over {len(data)} frames in as many bytes")
        if not pts:
            raise BadSampleError("video_empty", "no frame in it")
        shown = np.array(pts)
        packets = _in_order(shown, np.array(dts), np.array(keys, dtype=bool), stream)
        last = lasts[int(shown.argmax())] * float(stream.time_base or 1)
        packets = replace(packets, last=last)
        if missing_bytes(data):
            _check_whole(container, stream, len(pts) + hidden, packets)
        elif cut:  # all that other formats show of an early end
            raise BadSampleError("video_truncated", f"the last of {len(pts)} frames is cut")
        return packets


def _in_order(pts: np.ndarray, dts: np.ndarray, keys: np.ndarray, stream: VideoStream) -> Packets:
    """The list of frames, by their times where these can be trusted."""
    codec, rate = stream.codec_context, stream.average_rate or Fraction(25)
    pixels = codec.width * codec.height
    stamps = np.unique(pts)
    known = dts[dts != _NO_TIME]
    # Joined files begin again at an earlier time; AVI and some others give times in the order of
    # decoding to frames that are shown in another.
    all_differ = len(stamps) == len(pts) and stamps[0] != _NO_TIME
    go_back = bool((np.diff(known) < 0).any())
    not_sorted = codec.has_b_frames and len(pts) > 1 and bool((np.diff(pts) > 0).all())
    if not all_differ or go_back:
        counted = (np.arange(len(pts)) / float(rate)).tolist()
        return Packets(counted, None, [], pixels, rate)
    times = (stamps * float(stream.time_base or 1)).tolist()
    if not_sorted:
        return Packets(times, None, [], pixels, rate)
    return Packets(times, stamps.tolist(), np.sort(pts[keys]).tolist(), pixels, rate)


def _check_whole(
    container: InputContainer, stream: VideoStream, frames: int, packets: Packets
) -> None:
    """Refuses a file that ends too early, where a tenth or more of its frames is missing.

    A last frame may stay for long, and an edit list may hide frames: they are no loss.
    """
    declared, unit = stream.frames, float(stream.time_base or 1)
    if frames < 0.9 * declared:
        raise BadSampleError("video_truncated", f"{frames} of {declared} frames")
    seconds = packets.times[-1] - packets.times[0] + packets.last
    whole = stream.duration * unit if stream.duration else (container.duration or 0) / av.time_base
    if seconds < 0.9 * whole:
        raise BadSampleError("video_truncated", f"{seconds:.1f} of {whole:.1f} s")


def frame_times(data: bytes) -> list[float]:
    """Seconds of all frames of a video; decodes none, raises as `scan_packets`."""
    return scan_packets(data).times


def check_work(packets: Packets, wanted: Sequence[int], size: int) -> None:
    """Refuses what would take minutes, before it does.

    Counted and not timed, so that the verdict is the same on every machine.

    Args:
        wanted: numbers of frames.
        size: bytes of the file.

    Raises:
        BadSampleError: video_too_large.
    """
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


def decode_wanted(
    data: bytes,
    packets: Packets,
    wanted: Sequence[int],
    keep: Callable[[int, VideoFrame], None],
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Decodes some frames.

    Args:
        wanted: numbers of frames, not decreasing.
        keep: is called with the number and the frame, once for every different number in turn;
            where a video must be decoded again in a plainer way, from the first number on again.

    Raises:
        BadSampleError: as `scan_packets`.
    """
    targets = sorted(set(wanted))
    for way in _WAYS:
        try:
            with open_video(data, max_pixels) as (container, stream):
                for number, frame in _decoded(container, stream, packets, targets, way):
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
    frames = enumerate(_frames_of(container, stream, needed))
    at, frame = -math.inf, None
    for target in targets:
        stamp = stamps[target] if stamps else target
        nearest = bisect_right(keys, stamp) - 1
        jumped = nearest > 0 and keys[nearest] > at
        if jumped:
            try:
                container.seek(keys[nearest], stream=stream)
            except FFmpegError:
                raise _InexactError from None
            frames = enumerate(_frames_of(container, stream, needed))
        while jumped or at < stamp:
            number, frame = next(frames, (-1, None))
            if frame is None and way != _WAYS[-1]:
                raise _InexactError
            if frame is None:
                raise BadSampleError("video_truncated", f"it ends before frame {target}")
            at = frame.pts if stamps and frame.pts is not None else number
            if jumped and at > stamp:  # some formats seek only roughly
                raise _InexactError
            jumped = False
        assert frame is not None
        # Of a frame of two fields, each in a packet of its own, one may have been left out.
        if needed is not None and (at != stamp or frame.interlaced_frame):
            raise _InexactError
        yield target, frame


def _frames_of(
    container: InputContainer, stream: VideoStream, needed: set[int] | None
) -> Iterator[VideoFrame]:
    """All frames, or without some that nobody needs: neither a stamp of `needed` nor a frame that
    another one refers to is left out."""
    codec = stream.codec_context
    for packet in container.demux(stream):
        if needed is not None:
            wanted = packet.pts is None or packet.pts in needed
            codec.skip_frame = "DEFAULT" if wanted else "NONREF"
        for frame in packet.decode():
            check_memory(codec, frame.width, frame.height, frame.format.padded_bits_per_pixel)
            yield frame


def every_frame(
    data: bytes, packets: Packets, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[float, VideoFrame]]:
    """Yields all frames in order with their seconds, which never go back.

    Raises:
        BadSampleError: as `scan_packets`; video_truncated after the last frame, where over a
            tenth of them cannot be decoded.
    """
    check_work(packets, [len(packets.times) - 1], len(data))
    count, shown = 0, -math.inf
    with open_video(data, max_pixels) as (container, stream):
        for frame in _frames_of(container, stream, None):
            seconds = None if packets.stamps is None else frame.time
            if seconds is None:
                seconds = packets.times[min(count, len(packets.times) - 1)]
            count += 1
            if seconds > shown:
                shown = seconds
                yield seconds, frame
    if not count:
        raise BadSampleError("video_empty", "no frame in it")
    if count < 0.9 * len(packets.times):
        raise BadSampleError("video_truncated", f"{count} of {len(packets.times)} frames")


def count_frames(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Decodes a whole video and returns the number of its frames; raises as `every_frame`."""
    return sum(1 for _ in every_frame(data, scan_packets(data, max_pixels), max_pixels))


class Turn(NamedTuple):
    """How a frame is turned to be shown: rows and columns are exchanged first, if at all."""

    exchanged: bool = False
    mirrored: bool = False  # left and right
    flipped: bool = False  # top and bottom

    def __call__(self, pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Returns a view of the pixels as they are shown."""
        turned = pixels.swapaxes(0, 1) if self.exchanged else pixels
        turned = turned[:, ::-1] if self.mirrored else turned
        return turned[::-1] if self.flipped else turned


def turn_of(frame: VideoFrame) -> Turn:
    """How players show a frame: phones record in the position of their sensor.

    The display matrix takes column x and row y to (a x + c y, b x + d y). Of an angle between two
    quarters of a turn, the nearer one is taken.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Turn()
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(exchanged=True, mirrored=c < 0, flipped=b < 0)
    return Turn(mirrored=a < 0, flipped=d < 0)
