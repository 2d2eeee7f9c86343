"""Videos for shards: H.264, small, keyframes close by, none that looks ahead."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
from av import VideoFrame

from datamodules.batch import BadSampleError
from datamodules.frames import count_frames, open_image, open_video, upright

#: Of a video that comes as a folder of frames; LLaVA-Hound's are taken at this rate.
FOLDER_FPS = 2

Span = tuple[float, float]  # first and last second


def reencode(data: bytes, short_side: int, span: Span | None = None, gop: int = 8) -> bytes:
    """A video, or the seconds of it that `span` names, made cheap to read at random.

    Raises:
        BadSampleError: as `count_frames`; video_empty where nothing lies in the span.
    """
    count_frames(data)
    with open_video(data) as source:
        video = source.streams.video[0]
        frames = _part(_upright(source.decode(video)), span)
        return _encode(frames, short_side, gop, video.average_rate)


def encode_frames(
    pictures: Iterable[bytes], short_side: int | None, span: Span | None = None, gop: int = 8
) -> bytes:
    """Frames that come as images, `FOLDER_FPS` of them a second -> H.264.

    Raises:
        BadSampleError: as `FrameReader.image`; video_empty where nothing lies in the span.
    """

    def frames() -> Iterator[VideoFrame]:
        for number, data in enumerate(pictures):
            frame = VideoFrame.from_image(open_image(data))
            frame.pts, frame.time_base = number, Fraction(1, FOLDER_FPS)
            yield frame

    return _encode(_part(frames(), span), short_side, gop, Fraction(FOLDER_FPS))


def _part(frames: Iterable[VideoFrame], span: Span | None) -> Iterator[VideoFrame]:
    """The frames of the span, counted from the first frame; they come out from time 0 on."""
    if span is None:
        yield from frames
        return
    origin = first = None
    for frame in frames:
        if frame.pts is None or frame.time is None:
            continue
        origin = frame.time if origin is None else origin
        if span[0] <= frame.time - origin <= span[1]:
            first = frame.pts if first is None else first
            frame.pts -= first
            yield frame


def _upright(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    for frame in frames:
        pts, base = frame.pts, frame.time_base
        if frame.rotation:
            frame = VideoFrame.from_ndarray(upright(frame.to_ndarray(format="rgb24"), frame))
            frame.pts, frame.time_base = pts, base
        yield frame


def _encode(
    frames: Iterator[VideoFrame], short_side: int | None, gop: int, rate: Fraction | None
) -> bytes:
    first = next(frames, None)
    if first is None:
        raise BadSampleError("video_empty", "no frame in it")
    options = {"movflags": "faststart"}  # needs a file that can be opened twice
    with (
        NamedTemporaryFile(suffix=".mp4") as file,
        av.open(file.name, "w", format="mp4", options=options) as target,
    ):
        stream = target.add_stream("libx264", rate=rate or 25)
        stream.options = {"g": str(gop), "bf": "0", "threads": "1", "crf": "20"}
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = first.time_base or Fraction(1, 90_000)
        stream.width, stream.height = _even_size(first, short_side)
        for frame in chain([first], frames):
            small = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="AREA")
            target.mux(stream.encode(small))
        target.mux(stream.encode())
        target.close()
        return Path(file.name).read_bytes()


def _even_size(frame: VideoFrame, short_side: int | None) -> tuple[int, int]:
    scale = min(1.0, (short_side or math.inf) / min(frame.width, frame.height))
    width, height = (max(2, round(n * scale / 2) * 2) for n in (frame.width, frame.height))
    return width, height
