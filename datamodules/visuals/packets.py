"""Video bytes -> the list of its frames and their times, without decoding one."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from datamodules.errors import BadSampleError
from datamodules.visuals.container import open_video
from datamodules.visuals.headers import missing_bytes
from datamodules.visuals.images import MAX_PIXELS

# Pixels that may be decoded to reach the frames wanted: as many for any file, and more for each of
# its bytes. Films stay far below; kilobytes that claim hours of large frames do not.
_PIXELS_ANY, _PIXELS_A_BYTE = 20_000_000_000, 5_000

_NO_TIME = -(1 << 63)

# A step of time between frames, beyond the duration of the first, that is no gap but a join of two
# recordings. FFmpeg's own tools take the same number (-dts_delta_threshold), for formats of which
# libavformat says that their times may begin anew (AVFMT_TS_DISCONT): MPEG-TS and MPEG-PS.
_JOIN_SECONDS, _MAY_BE_JOINED = 10, 0x200


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
        origin: the time at which the file begins, of the first frame or of a sound before it.
            Players count from there.
    """

    times: list[float]
    stamps: list[int] | None
    keys: list[int]
    pixels: int
    rate: Fraction
    last: float = 0.0
    origin: float = 0.0

    def counted(self) -> "Packets":
        """Returns the same list for a decoder that counts its frames."""
        return replace(self, stamps=None, keys=[])


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
            if packet.is_discard or _is_hidden(packet, stream):  # decoded for others, never shown
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
        joined = _is_joined(np.array(dts), np.array(lasts), container, stream)
        guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
        packets = _in_order(shown, np.array(keys, dtype=bool), stream, joined, guessed)
        last = lasts[int(shown.argmax())] * float(stream.time_base or 1)
        packets = replace(packets, last=last, origin=_origin(container, packets))
        if missing_bytes(data):
            _check_whole(container, stream, len(pts) + hidden, packets)
        elif cut:  # all that other formats show of an early end
            raise BadSampleError("video_truncated", f"the last of {len(pts)} frames is cut")
        return packets


def _is_hidden(packet: Packet, stream: VideoStream) -> bool:
    """Whether a packet only holds a picture that others refer to (an alternate reference).

    VP8 gives it a packet of its own, which no container marks: a bit of its head says it (RFC 6386,
    9.1, `show_frame`). VP9 and AV1 hide such pictures in the packet of a frame that is shown.
    """
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _is_joined(
    dts: np.ndarray, durations: np.ndarray, container: InputContainer, stream: VideoStream
) -> bool:
    """Whether the times begin anew within a file, as where recordings stand behind one another.

    A step back of 33-bit times may look like one forward: libavformat takes it for their overflow.
    """
    known = dts != _NO_TIME
    steps = np.diff(dts[known])
    if (steps < 0).any():
        return True
    longest = _JOIN_SECONDS / float(stream.time_base or 1)
    may_be = bool(container.format.flags & _MAY_BE_JOINED)
    return may_be and bool((steps - durations[known][:-1] > longest).any())


def _in_order(
    pts: np.ndarray, keys: np.ndarray, stream: VideoStream, joined: bool, guessed: bool
) -> Packets:
    """The list of frames, by their times where these can be trusted.

    Args:
        joined: the times begin anew within the file.
        guessed: the file keeps no times of frames that are shown in another order than decoded;
            libavformat guesses them, and is wrong where frames are left out or packed in pairs.
    """
    codec, rate = stream.codec_context, stream.average_rate or Fraction(25)
    pixels = codec.width * codec.height
    stamps = np.unique(pts)
    all_differ = len(stamps) == len(pts) and stamps[0] != _NO_TIME
    if joined or not all_differ:
        counted = (np.arange(len(pts)) / float(rate)).tolist()
        return Packets(counted, None, [], pixels, rate)
    times = (stamps * float(stream.time_base or 1)).tolist()
    # Files that were copied out of such a container give times in the order of decoding.
    not_sorted = codec.has_b_frames and len(pts) > 1 and bool((np.diff(pts) > 0).all())
    if guessed or not_sorted:
        return Packets(times, None, [], pixels, rate)
    return Packets(times, stamps.tolist(), np.sort(pts[keys]).tolist(), pixels, rate)


def _origin(container: InputContainer, packets: Packets) -> float:
    """The time at which a file begins.

    Where frames are counted, their times are not those of the container: the first one begins it.
    """
    if packets.stamps is None or container.start_time is None:
        return packets.times[0]
    return min(container.start_time / av.time_base, packets.times[0])


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
