"""Videos with odd times, tracks and codecs: the frames are those of a player, in its order.

Expected results were worked out by hand, or come from PyAV, which decodes everything from the first
packet on.
"""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest

from datamodules.errors import BadSampleError
from datamodules.shards.reencode import reencode
from datamodules.visuals import videos
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from datamodules.visuals.packets import frame_times
from datamodules.visuals.videos import AREA, count_frames
from tests.helpers.films import copied, film, noise, with_tracks

ALL = FrameReader(16, lambda times: list(range(len(times))))


def shown(data: bytes) -> np.ndarray:
    """Returns all frames (t c h w) in the order of a decoder that skips nothing."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = [
            frame.reformat(16, 16, "rgb24", interpolation=AREA).to_ndarray()
            for frame in container.decode(container.streams.best("video"))
        ]
    return np.stack(frames).transpose(0, 3, 1, 2)


def numbers(frames: np.ndarray, among: np.ndarray) -> list[int]:
    """Returns the number of each frame among the given frames, by its pixels."""
    distances = np.abs(frames[:, None].astype(int) - among[None]).mean((2, 3, 4))
    return distances.argmin(1).tolist()


def pictures_of(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the pictures that were encoded, as 16 x 16 pixels (t c h w)."""
    rows = [picture[1::3, 2::4] for picture in pictures]
    return np.stack(rows).transpose(0, 3, 1, 2)


# --- the last frame, and frames that are hidden ---------------------------------------------------


@pytest.mark.parametrize("gop", [100, 15, 20])
def test_frames_before_the_cut_of_an_edit_list_are_no_loss(gop):
    """The file is as `ffmpeg -ss 4 -i in.mp4 -c copy` leaves six seconds, for any keyframes."""
    pictures = noise(60)
    cut = copied(film(pictures, g=gop, sc_threshold=0), shift=-4.0)
    with av.open(io.BytesIO(cut), "r") as container:
        assert container.streams.video[0].frames == 60  # the hidden frames are in the file
    assert len(frame_times(cut)) == count_frames(cut) == 20
    assert numbers(ALL.video(cut).numpy(), pictures_of(pictures)) == list(range(40, 60))
    again = reencode(cut, 48)
    assert numbers(ALL.video(again).numpy(), pictures_of(pictures)) == list(range(40, 60))


STILL = {
    "slides of 5 s each": film(noise(6), rate=Fraction(1, 5)),
    "one frame of 5 s": film(noise(1), rate=Fraction(1, 5)),
    "2 s of action, 8 s still": film(noise(20), last=8.0, bf=0),
    "2 s of action, 8 s still, mkv": film(noise(20), "matroska", last=8.0, bf=0),
    "a GIF whose last picture stays 3 s": film(
        noise(4), "gif", "gif", "rgb8", seconds=[0, 0.1, 0.2, 0.3], muxer={"final_delay": "300"}
    ),
}


@pytest.mark.parametrize("name", STILL)
def test_a_last_frame_that_stays_is_no_loss(name):
    data = STILL[name]
    frames = {"slides of 5 s each": 6, "one frame of 5 s": 1}.get(name, 20)
    frames = 4 if "GIF" in name else frames
    assert ALL.video(data).shape[0] == count_frames(data) == frames
    assert (ALL.video(data).numpy() == shown(data)).all()
    assert count_frames(reencode(data, 48)) == frames


def test_a_still_end_of_which_the_file_keeps_no_length(tmp_path):
    """Matroska states ten seconds, but its last block has no duration."""
    data = STILL["2 s of action, 8 s still, mkv"]
    with av.open(io.BytesIO(data), "r") as container:
        assert (container.duration or 0) / av.time_base == pytest.approx(9.9, abs=0.2)
    with pytest.raises(BadSampleError) as caught:
        count_frames(data[: len(data) // 2])
    assert caught.value.reason == "video_truncated"


@pytest.mark.parametrize("container", ["mp4", "avi", "matroska"])
def test_a_file_that_ends_too_early_is_truncated(container):
    """One file of each format that states a duration.

    The parts of an MP4 are sorted such that it can be read from the start.
    """
    data = film(noise(60), container, bf=0)
    if container == "mp4":
        data = faststart(data)
    assert count_frames(data) == 60
    for read in (count_frames, ALL.video, frame_times):
        with pytest.raises(BadSampleError) as caught:
            read(data[: len(data) * 2 // 3])
        assert caught.value.reason == "video_truncated"
    assert len(frame_times(data[: len(data) - 20])) >= 58  # a scratch


def test_a_scratch_at_the_end_of_a_still_is_no_loss():
    """By the table in the header, the last frame lasts for four fifths of the film."""
    data = faststart(STILL["2 s of action, 8 s still"])
    assert frame_times(data[:-5])[-1] == pytest.approx(1.9)


def faststart(data: bytes) -> bytes:
    """Returns the same MP4 with `moov` in front. The offsets of chunks grow by its size."""
    moov, mdat = data.index(b"moov") - 4, data.index(b"mdat") - 4
    size = int.from_bytes(data[moov : moov + 4], "big")
    head = bytearray(data[moov : moov + size])
    at = head.index(b"stco") + 8
    for n in range(int.from_bytes(head[at : at + 4], "big")):
        place = at + 4 + 4 * n
        offset = int.from_bytes(head[place : place + 4], "big") + (size if mdat < moov else 0)
        head[place : place + 4] = offset.to_bytes(4, "big")
    return data[:mdat] + bytes(head) + data[mdat:moov] + data[moov + size :]


def test_a_span_without_a_new_frame_is_the_frame_on_the_screen():
    slides = film(noise(6), rate=Fraction(1, 5))
    part = reencode(slides, 48, (11.0, 14.0))
    assert numbers(ALL.video(part).numpy(), shown(slides)) == [2]
    assert numbers(ALL.video(reencode(slides, 48, (27.0, 29.0))).numpy(), shown(slides)) == [5]
    with pytest.raises(BadSampleError, match="video_empty"):
        reencode(slides, 48, (30.5, 40.0))  # after its end


# --- times that go back ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(1000, 77)])
def test_joined_transport_streams_are_counted(rate):
    """The second part begins again near zero: at the times of the first part, or between them."""
    pictures = noise(20, seed=1), noise(25, seed=2)
    data = film(pictures[0], "mpegts") + film(pictures[1], "mpegts", rate=rate)
    pictures = [*pictures[0], *pictures[1]]
    times = frame_times(data)
    assert len(times) == 45
    assert (np.diff(times) > 0).all()
    assert numbers(ALL.video(data).numpy(), pictures_of(pictures)) == list(range(45))
    again = reencode(data, 48)
    assert numbers(ALL.video(again).numpy(), pictures_of(pictures)) == list(range(45))


def test_avi_has_times_in_the_order_of_decoding():
    """AVI with B-frames: its times belong to other frames."""
    pictures = noise(30)
    data = film(pictures, "avi", bf=3, g=10)
    assert numbers(ALL.video(data).numpy(), pictures_of(pictures)) == list(range(30))
    some = FrameReader(16, lambda times: [3, 11, 12, 26, 29]).video(data).numpy()
    assert numbers(some, pictures_of(pictures)) == [3, 11, 12, 26, 29]
    assert frame_times(data) == pytest.approx([0.1 + n / 10 for n in range(30)], abs=0.11)
    again = reencode(data, 48)
    assert numbers(ALL.video(again).numpy(), pictures_of(pictures)) == list(range(30))


# --- which track ----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_small_track_before_the_film_is_passed_over(container):
    thumbnail, pictures = noise(1, 32, 32, seed=7), noise(30)
    data = with_tracks((thumbnail, "mjpeg"), (pictures, "libx264"), container=container)
    assert numbers(ALL.video(data).numpy(), pictures_of(pictures)) == list(range(30))
    assert count_frames(data) == len(frame_times(data)) == 30
    assert count_frames(reencode(data, 48)) == 30


@pytest.mark.parametrize("first_is", ["default", "first", "neither"])
@pytest.mark.parametrize("codecs", [("mjpeg", "libx264"), ("libx264", "libx264")])
def test_a_thumbnail_of_matroska_is_passed_over(codecs, first_is):
    """libavformat gives no duration for the film, and a wrong or no one for the thumbnail.

    The tags of the tracks have both.
    """
    thumbnail, pictures = noise(1, 32, 32, seed=7), noise(30)
    flags = {"default": (1, 0), "first": (None, None), "neither": (0, 0)}[first_is]
    tracks = zip((thumbnail, pictures), codecs, strict=True)
    data = with_tracks(*tracks, container="matroska", dispositions=flags)
    assert numbers(ALL.video(data).numpy(), pictures_of(pictures)) == list(range(30))
    without_tags = data.replace(b"DURATION", b"DURATHON")
    with av.open(io.BytesIO(without_tags), "r") as container:
        assert all(not stream.metadata.get("DURATION") for stream in container.streams)
        best = container.streams.best("video")
        expected = 30 if best is container.streams.video[1] else 1
    assert count_frames(without_tags) == expected  # as FFmpeg does if nothing distinguishes them


def test_a_cover_picture_is_no_video():
    """MP4 stores it in `covr`; FFmpeg makes a track of it, before or after the film."""
    film_with, only = with_cover(film(noise(12), bf=0)), with_cover(sound())
    with av.open(io.BytesIO(film_with), "r") as container:
        assert len(container.streams.video) == 2
    assert count_frames(film_with) == 12
    with pytest.raises(BadSampleError) as caught:
        ALL.video(only)
    assert caught.value.reason == "not_a_video"


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def with_cover(data: bytes) -> bytes:
    """Returns an MP4 with a PNG in its list of metadata; `moov` is the last box."""

    def box(kind: bytes, content: bytes) -> bytes:
        return (8 + len(content)).to_bytes(4, "big") + kind + content

    picture = av.VideoFrame.from_ndarray(noise(1, 32, 32)[0], format="rgb24")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 32, 32, "rgb24"
    encoder.time_base = Fraction(1, 1)
    png = b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
    cover = box(b"covr", box(b"data", b"\0\0\0\x0e\0\0\0\0" + png))  # 14 is PNG
    handler = box(b"hdlr", b"\0" * 8 + b"mdirappl" + b"\0" * 9)
    udta = box(b"udta", box(b"meta", b"\0" * 4 + handler + box(b"ilst", cover)))
    at = data.index(b"moov") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    assert at + size == len(data)
    return data[:at] + (size + len(udta)).to_bytes(4, "big") + data[at + 4 :] + udta


# --- frames that nobody wants ---------------------------------------------------------------------

CODECS = {
    "x264's defaults": film(noise(60), preset="medium"),
    "pyramid": film(noise(60), bf=8, **{"b-pyramid": "normal"}, g=30),
    "open groups": film(noise(60), "mpegts", bf=3, g=12, **{"x264-params": "open-gop=1"}),
    "interlaced": film(noise(40), bf=2, **{"x264-params": "tff=1"}),
    "intra refresh": film(noise(40), "mpegts", bf=0, **{"intra-refresh": "1"}, g=20),
    "mpeg2": film(noise(40), "mpegts", "mpeg2video", rate=25, bf=2, g=12),
    "mpeg4": film(noise(40), "mp4", "mpeg4", bf=2, g=12),
    "mkv": film(noise(40), "matroska", bf=3, g=20),
}


@pytest.mark.parametrize("name", CODECS)
def test_what_is_left_out_changes_no_frame(name):
    data, rng = CODECS[name], np.random.default_rng(3)
    expected = shown(data)
    count = len(frame_times(data))
    assert count == len(expected)
    for wanted in ([0, count - 1], *(sorted(rng.integers(0, count, 5)) for _ in range(6))):
        frames = FrameReader(16, lambda times, w=wanted: [int(n) for n in w]).video(data).numpy()
        assert (frames == expected[wanted]).all(), wanted


def test_frames_that_nobody_wants_are_not_decoded(monkeypatch):
    decoded = []
    check = videos.check_memory
    monkeypatch.setattr(videos, "check_memory", lambda *of: (decoded.append(of), check(*of)))
    data = film(noise(60), bf=3, g=60, **{"x264-params": "b-adapt=0:b-pyramid=0:scenecut=0"})
    FrameReader(16, UniformSampler(3)).video(data)
    assert len(decoded) <= 20  # every fourth is a reference
    decoded.clear()
    ALL.video(data)
    assert len(decoded) == 60


def test_a_frame_of_two_fields_is_never_left_out(monkeypatch):
    """Its fields may lie in two packets, each with its own time."""
    decoded = []
    check = videos.check_memory
    monkeypatch.setattr(videos, "check_memory", lambda *of: (decoded.append(of), check(*of)))
    FrameReader(16, UniformSampler(2)).video(CODECS["interlaced"])
    assert len(decoded) >= 40


def test_samplers_see_the_seconds_of_the_stream():
    data = film(noise(20), rate=5)
    assert frame_times(data) == pytest.approx([n / 5 for n in range(20)])
    assert FpsSampler(1.0, 100)(frame_times(data)) == [0, 5, 10, 15]
