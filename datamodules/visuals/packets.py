"""Video bytes -> the list of frames with their times, without decoding."""

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

# Maximum pixels decoded to reach the wanted frames: a constant per file, plus a number per byte.
# Real films stay far below. A file of a few kilobytes that claims hours of large frames exceeds it.
_PIXELS_ANY, _PIXELS_A_BYTE = 20_000_000_000, 5_000

_NO_TIME = -(1 << 63)

# A larger time step between frames, beyond the duration of the first, is a join of two recordings
# and not a gap. FFmpeg's tools use the same number (-dts_delta_threshold) for the formats whose
# times may restart according to libavformat (AVFMT_TS_DISCONT): MPEG-TS and MPEG-PS.
_JOIN_SECONDS, _MAY_BE_JOINED = 10, 0x200


@dataclass(frozen=True)
class Packets:
    """The frames of a video as listed by its container, in display order.

    Attributes:
        times: times of the frames in seconds.
        stamps: the same in units of the stream. None if the container's times do not identify
            frames; then frames are counted as the decoder returns them.
        keys: stamps at which decoding can start.
        pixels: pixels of one frame.
        rate: average frames per second.
        last: seconds for which the last frame is shown.
        origin: start time of the file in seconds: of the first frame, or of audio before it.
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
    """Lists the frames of a video without decoding any.

    Raises:
        BadSampleError: video_unreadable, video_empty, video_truncated, video_too_large,
            not_a_video.
    """
    with open_video(data, max_pixels) as (container, stream):
        # Keep numbers, not the packets: these would hold a second copy of the whole file.
        pts, dts, lasts, keys = array("q"), array("q"), array("q"), array("b")
        hidden, cut = 0, False
        for packet in container.demux(stream):
            if not packet.size:
                continue
            cut = packet.is_corrupt
            if packet.is_discard or _is_hidden(packet, stream):  # only a reference, never shown
                hidden += 1
            else:
                pts.append(_NO_TIME if packet.pts is None else packet.pts)
                dts.append(_NO_TIME if packet.dts is None else packet.dts)
                lasts.append(packet.duration or 0)
                keys.append(packet.is_keyframe)
            if len(pts) + hidden > len(data):
                raise BadSampleError(
                    "video_too_large", f"more than {len(data)} frames in the same number of bytes"
                )
        if not pts:
            raise BadSampleError("video_empty", "it has no frame")
        shown = np.array(pts)
        joined = _is_joined(np.array(dts), np.array(lasts), container, stream)
        guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
        packets = _in_order(shown, np.array(keys, dtype=bool), stream, joined, guessed)
        last = lasts[int(shown.argmax())] * float(stream.time_base or 1)
        packets = replace(packets, last=last, origin=_origin(container, packets))
        if missing_bytes(data):
            _check_whole(container, stream, len(pts) + hidden, packets)
        elif cut:  # the only sign of an early end in other formats
            raise BadSampleError("video_truncated", f"the last of {len(pts)} frames is cut")
        return packets


def _is_hidden(packet: Packet, stream: VideoStream) -> bool:
    """Returns True if a packet holds only a hidden reference frame (an alternate reference).

    In VP8 it is a packet of its own that no container marks. A bit of its header shows it
    (RFC 6386, 9.1, `show_frame`). VP9 and AV1 put such frames into the packet of a shown frame.
    """
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _is_joined(
    dts: np.ndarray, durations: np.ndarray, container: InputContainer, stream: VideoStream
) -> bool:
    """Returns True if the times restart within a file, as in concatenated recordings.

    A step back may look like a step forward, because libavformat takes it for an overflow of the
    33-bit times.
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
    """Returns the list of frames, sorted by their times if these are reliable.

    Args:
        joined: the times restart within the file.
        guessed: the file has no display times, and display order differs from decoding order.
            libavformat guesses the times, and is wrong if frames are dropped or packed in pairs.
    """
    codec, rate = stream.codec_context, stream.average_rate or Fraction(25)
    pixels = codec.width * codec.height
    stamps = np.unique(pts)
    all_differ = len(stamps) == len(pts) and stamps[0] != _NO_TIME
    if joined or not all_differ:
        counted = (np.arange(len(pts)) / float(rate)).tolist()
        return Packets(counted, None, [], pixels, rate)
    times = (stamps * float(stream.time_base or 1)).tolist()
    # Files remuxed from such a container have their times in decoding order.
    not_sorted = codec.has_b_frames and len(pts) > 1 and bool((np.diff(pts) > 0).all())
    if guessed or not_sorted:
        return Packets(times, None, [], pixels, rate)
    return Packets(times, stamps.tolist(), np.sort(pts[keys]).tolist(), pixels, rate)


def _origin(container: InputContainer, packets: Packets) -> float:
    """Returns the start time of a file in seconds.

    Counted frames do not use the container's times, so the first frame starts the file.
    """
    if packets.stamps is None or container.start_time is None:
        return packets.times[0]
    return min(container.start_time / av.time_base, packets.times[0])


def _check_whole(
    container: InputContainer, stream: VideoStream, frames: int, packets: Packets
) -> None:
    """Refuses a file that ends too early: more than a tenth of its frames or time is missing.

    A long last frame and frames hidden by an edit list do not count as missing.
    """
    declared, unit = stream.frames, float(stream.time_base or 1)
    if frames < 0.9 * declared:
        raise BadSampleError("video_truncated", f"{frames} of {declared} frames")
    seconds = packets.times[-1] - packets.times[0] + packets.last
    whole = stream.duration * unit if stream.duration else (container.duration or 0) / av.time_base
    if seconds < 0.9 * whole:
        raise BadSampleError("video_truncated", f"{seconds:.1f} of {whole:.1f} s")


def frame_times(data: bytes) -> list[float]:
    """Returns the times of all frames in seconds, without decoding. Raises as `scan_packets`."""
    return scan_packets(data).times


def check_work(packets: Packets, wanted: Sequence[int], size: int) -> None:
    """Refuses a video that would take minutes to decode.

    The limit counts pixels, not time, so the result is the same on every machine.

    Args:
        wanted: numbers of the wanted frames.
        size: size of the file in bytes.

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
