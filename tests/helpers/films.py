"""Makes small videos of any codec, container, timing, colour and orientation with PyAV."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np


def noise(count: int, width: int = 64, height: int = 48, seed: int = 0) -> list[np.ndarray]:
    """Returns RGB pictures of random smooth patches, all different."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, height // 16, width // 16, 3), dtype=np.uint8)
    return list(small.repeat(16, axis=1).repeat(16, axis=2))


def film(
    pictures: Sequence[np.ndarray],
    container: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: Fraction | int = 10,
    seconds: Sequence[float] | None = None,
    last: float | None = None,
    muxer: dict[str, str] | None = None,
    **options: Any,
) -> bytes:
    """Returns a video file of the given pictures.

    Args:
        seconds: time of each picture; by default `rate` decides.
        last: duration of the last picture in seconds.
        muxer: options of the muxer.
        options: options of the encoder.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.pix_fmt = pixels
        stream.options = {"threads": "1", **{key: str(value) for key, value in options.items()}}
        if seconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.height, stream.width = pictures[0].shape[:2]
        packets = []
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            if seconds is not None:
                frame.pts, frame.time_base = round(1000 * seconds[number]), Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        if last is not None:
            shown_last = max(packets, key=lambda packet: packet.pts)
            shown_last.duration = round(last / shown_last.time_base)
        out.mux(packets)
    return file.getvalue()


def copied(
    data: bytes, container: str = "mp4", shift: float = 0.0, muxer: dict[str, str] | None = None
) -> bytes:
    """Copies the packets into another file, `shift` seconds later, as `ffmpeg -c copy` does."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data), "r") as source,
        av.open(file, "w", format=container, options=muxer or {}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is None:
                continue
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = (packet.pts or 0) + ticks, packet.dts + ticks
            packet.stream = stream
            out.mux(packet)
    return file.getvalue()


def with_tracks(
    *pictures: tuple[Sequence[np.ndarray], str],
    container: str = "mp4",
    dispositions: Sequence[int | None] | None = None,
) -> bytes:
    """Returns a file with several video tracks.

    Args:
        pictures: (pictures, codec) of each track.
        dispositions: FFmpeg's disposition flags of each track; None means the muxer's default.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        streams = []
        for track, codec in pictures:
            stream = out.add_stream(codec, rate=10)
            stream.height, stream.width = track[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            streams.append(stream)
        for stream, flags in zip(streams, dispositions or (), strict=False):
            if flags is not None:
                stream.disposition = flags
        for stream, (track, _) in zip(streams, pictures, strict=True):
            for picture in track:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            out.mux(stream.encode())
    return file.getvalue()


def plain(
    rgb_to_yuv: tuple[float, float],
    color: Sequence[int],
    full: bool,
    bits: int,
    tags: dict[str, int],
    size: tuple[int, int] = (64, 48),
    frames: int = 12,
) -> bytes:
    """Returns a video of one colour. Its Y, Cb and Cr are computed here.

    Args:
        rgb_to_yuv: Kr and Kb of the matrix.
        full: whether Y has the full range; if not, it goes from 16 / 256 to 235 / 256 of it.
        tags: colorspace and color_range of the file, as FFmpeg numbers them.
    """
    kr, kb = rgb_to_yuv
    red, green, blue = (value / 255 for value in color)
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    scale, most = 1 << bits - 8, (1 << bits) - 1
    if full:
        values = [y * most, cb * most + 128 * scale, cr * most + 128 * scale]
    else:
        values = [(16 + 219 * y) * scale, (128 + 224 * cb) * scale, (128 + 224 * cr) * scale]
    width, height = size
    kind = np.uint8 if bits == 8 else np.dtype("<u2")
    planes = [np.full((height, width), round(values[0]), kind)]
    planes += [np.full((height // 2, width // 2), round(value), kind) for value in values[1:]]
    pixels = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"crf": "1", "threads": "1"}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(frames):
            frame = av.VideoFrame(width, height, pixels)
            for plane, content in zip(frame.planes, planes, strict=True):
                row = content.tobytes()[: content.shape[1] * content.itemsize]
                plane.update(row.ljust(plane.line_size, b"\0") * plane.height)
            for name, value in tags.items():
                setattr(frame, name, value)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Returns the MP4 with this display matrix in its track header.

    Column x and row y of a picture are shown at (a x + c y, b x + d y).
    """
    changed = bytearray(data)
    at = data.index(b"tkhd") + 4 + 40  # after version, times, layer and volume
    one = 1 << 16
    struct.pack_into(">9i", changed, at, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return bytes(changed)
