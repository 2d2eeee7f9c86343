"""Videos whose packets are not their frames, or whose times are wrong.

Expected results were worked out by hand, or come from PyAV, which decodes everything from the first
packet on.
"""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.files import Annotation
from datamodules.shards.annotations.media import Media
from datamodules.shards.pack import pack_shard, plan_shards, verify_shard
from datamodules.shards.reencode import reencode
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from datamodules.visuals.packets import frame_times, scan_packets
from datamodules.visuals.videos import count_frames
from tests.datamodules.visuals.test_videos import ALL, faststart, numbers, pictures_of, shown
from tests.helpers.films import copied, film, noise

Listed = list[tuple[bytes, int, int, bool]]  # packets: content, pts, dts, whether it is a keyframe


def rewritten(
    data: bytes,
    container: str,
    change: Callable[[Listed], Listed],
    muxer: dict[str, str] | None = None,
) -> bytes:
    """Returns the same video with other packets. Times have the unit of the source."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(data), "r") as source,
        av.open(file, "w", format=container, options=muxer or {}) as out,
    ):
        before = source.streams.video[0]
        stream = out.add_stream_from_template(before)
        listed = [
            (bytes(packet), packet.pts or 0, packet.dts or 0, packet.is_keyframe)
            for packet in source.demux(before)
            if packet.size
        ]
        for content, pts, dts, key in change(listed):
            packet = av.Packet(content)
            packet.pts, packet.dts, packet.time_base = pts, dts, before.time_base
            packet.is_keyframe, packet.stream = key, stream
            out.mux(packet)
    return file.getvalue()


def some(data: bytes, wanted: Sequence[int]) -> np.ndarray:
    return FrameReader(16, lambda times: list(wanted)).video(data).numpy()


def agrees(data: bytes, pictures: Sequence[np.ndarray], times_lie: bool = False) -> None:
    """Every way of reading gives these pictures, whichever other frames are requested.

    If the times of a file are wrong, this holds only if the frames that show it are decoded.
    """
    assert len(frame_times(data)) == count_frames(data) == len(pictures)
    assert numbers(ALL.video(data).numpy(), pictures_of(pictures)) == list(range(len(pictures)))
    rng = np.random.default_rng(5)
    for _ in range(0 if times_lie else 8):
        wanted = sorted(rng.integers(0, len(pictures), 4).tolist())
        assert numbers(some(data, wanted), pictures_of(pictures)) == wanted
    again = ALL.video(reencode(data, 48)).numpy()
    assert numbers(again, pictures_of(pictures)) == list(range(len(pictures)))


# --- packets that are no frames -------------------------------------------------------------------


@pytest.mark.parametrize("container", ["webm", "matroska", "avi"])
def test_pictures_of_vp8_that_are_never_shown_are_no_frames(container):
    """In two passes, libvpx writes a hidden frame in its own packet.

    Its time is that of the next frame. Here it is a copy of the keyframe with `show_frame` = 0.
    """
    pictures = noise(60)

    def with_hidden(listed: Listed) -> Listed:
        made = []
        for content, pts, dts, key in listed:
            if key and pts:
                made.append((bytes([content[0] & ~0x10]) + content[1:], pts, dts, key))
            made.append((content, pts, dts, key))
        if container == "avi":  # a place for every packet
            made = [(content, n, n, key) for n, (content, _, _, key) in enumerate(made)]
        return made

    data = film(pictures, "avi" if container == "avi" else "webm", "libvpx", g=10, crf=4, b="2M")
    data = rewritten(data, container, with_hidden)
    with av.open(io.BytesIO(data), "r") as file:
        assert sum(1 for packet in file.demux(video=0) if packet.size) >= 65
    assert (ALL.video(data).numpy() == shown(data)).all()
    agrees(data, pictures)


# --- times that belong to other frames ------------------------------------------------------------


def packed(listed: Listed) -> Listed:
    """Returns a packed bitstream of DivX and XviD, which a text in the header announces.

    A B-frame lies in the packet of the frame that it waits for. An empty frame takes its place.
    """
    made = []
    for n, (content, _, _, key) in enumerate(listed):
        if n == 0:
            at = content.index(b"\0\0\1\xb6")
            content = content[:at] + b"\0\0\1\xb2DivX503b1393p" + content[at:]
        kind = content[content.index(b"\0\0\1\xb6") + 4] >> 6
        if kind == 2:  # B
            before = made[-1]
            made[-1] = (before[0] + content, *before[1:])
            content = b"\0\0\1\xb6\x52\x9f"
        made.append((content, n, n, key))
    return made


def with_gaps(listed: Listed) -> Listed:
    """Frames that the encoder left out: AVI has an empty chunk in their place."""
    places = [n + n // 3 for n in range(len(listed))]
    return [(content, n, n, key) for n, (content, _, _, key) in zip(places, listed, strict=True)]


@pytest.mark.parametrize("change", [packed, with_gaps])
def test_b_frames_of_mpeg4_in_avi_are_counted(change):
    pictures = noise(50)
    data = film(pictures, "avi", "mpeg4", bf=1, g=10, qscale=2, b="4M")
    data = rewritten(data, "avi", change)
    assert scan_packets(data).stamps is None  # AVI stores no presentation times
    agrees(data, pictures)


def test_frames_whose_times_go_back_are_counted():
    """A file that names the wrong frame at some places: all frames are kept, in order."""
    pictures = noise(50)

    def swapped(listed: Listed) -> Listed:
        pts = [one[1] for one in listed]
        for n in (13, 31):
            pts[n], pts[n + 1] = pts[n + 1], pts[n]
        dts = range(-300, 100 * len(listed), 100)  # none is later than its pts
        return [(one[0], new, d, one[3]) for one, new, d in zip(listed, pts, dts, strict=False)]

    options = {"x264-params": "b-adapt=0:b-pyramid=0:scenecut=0"}
    data = film(pictures, "matroska", bf=1, g=50, **options)
    data = rewritten(data, "matroska", swapped)
    with av.open(io.BytesIO(data), "r") as file:
        steps = np.diff([frame.pts for frame in file.decode(video=0)])
        assert (steps < 0).any()
    agrees(data, pictures, times_lie=True)


# --- times that jump ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.0, 100.0])
def test_joined_recordings_of_different_starts_are_counted(first):
    """To libavformat, a step back of 100 s looks like a step forward of 2^33 ticks (95,443 s)."""
    pictures = noise(60, seed=1), noise(60, seed=2)
    starts = first, 100.0 - first
    parts = [
        copied(film(part, "mpegts", g=20), "mpegts", shift=start)
        for part, start in zip(pictures, starts, strict=True)
    ]
    data = parts[0] + parts[1]
    times = frame_times(data)
    assert np.diff(times) == pytest.approx(np.full(119, 0.1))
    assert len(FpsSampler(1.0, 1000)(times)) == 12
    agrees(data, [*pictures[0], *pictures[1]])
    again = frame_times(reencode(data, 48))
    assert again[-1] - again[0] == pytest.approx(11.9)


def test_times_of_a_stream_whose_clock_overflows_are_kept():
    """33 bits at 90 kHz overflow after 95,443.7 s."""
    data = copied(film(noise(60), "mpegts", g=20), "mpegts", shift=95440.0)
    times = frame_times(data)
    assert np.diff(times) == pytest.approx(np.full(59, 0.1))
    agrees(data, noise(60))


def test_slides_that_stay_for_long_are_no_join():
    data = film(noise(6), "mpegts", rate=Fraction(1, 20), bf=0)
    times = np.array(frame_times(data))
    assert times - times[0] == pytest.approx(np.arange(6) * 20.0)
    assert scan_packets(data).stamps is not None  # the times are those of the file


def test_a_gap_beyond_what_mp4_can_hold_is_refused():
    """FFmpeg's writer shortens it to one tick."""
    seconds = [0, 0.1, 0.2, 30_000, 30_000.1]
    data = film(noise(5), "matroska", seconds=seconds, bf=0)
    with pytest.raises(BadSampleError, match="video_unreadable: 30000 s without a frame"):
        reencode(data, 48)
    shorter = film(noise(5), "matroska", seconds=[0, 0.1, 0.2, 20_000, 20_000.1], bf=0)
    times = frame_times(reencode(shorter, 48))
    assert times[-1] - times[0] == pytest.approx(20_000.1)


# --- frames that cannot be decoded ----------------------------------------------------------------


def cut_and_joined(kept: slice) -> bytes:
    """Returns a transport stream that begins inside a group, twice. The frames can be counted."""
    data = film(noise(60), "mpegts", bf=2, g=20)
    packets = [data[n : n + 188] for n in range(0, len(data), 188)]
    return b"".join(packets[kept]) * 2


def test_the_last_frame_stands_for_those_that_are_lost():
    """Only a few frames are missing: a file that verify accepts can be read."""
    made = (cut_and_joined(slice(start, None)) for start in range(4, 60, 4))
    lost = ((data, len(frame_times(data)) - len(shown(data))) for data in made)
    data, missing = next((data, n) for data, n in lost if 4 <= n <= 10)
    listed = len(frame_times(data))
    assert count_frames(data) == listed - missing
    expected = shown(data)
    frames = ALL.video(data).numpy()
    assert (frames[: len(expected)] == expected).all()
    assert (frames[len(expected) :] == expected[-1]).all()
    assert (some(data, [0, listed - 1])[1] == expected[-1]).all()


@pytest.mark.parametrize("twice", [False, True])
def test_a_stream_of_which_over_a_tenth_is_lost_is_truncated(twice, tmp_path):
    """The reader and `pack` refuse it, too, not only programs that decode all of it."""
    data = film(noise(60), "mpegts", bf=2, g=30, seed=1)
    packets = [data[n : n + 188] for n in range(0, len(data), 188)]
    cut = next(
        made
        for start in range(8, len(packets), 4)
        if len(frame_times(made := b"".join(packets[start:]))) - len(shown(made)) > 10
    )
    data = cut * 2 if twice else cut
    for read in (count_frames, ALL.video, FrameReader(16, UniformSampler(2)).video):
        with pytest.raises(BadSampleError) as caught:
            read(data)
        assert caught.value.reason == "video_truncated"
    assert packed_and_verified(tmp_path, data, "a.ts") == (0, ["video_truncated"], 0)


@pytest.mark.parametrize("share", [0.999, 0.98, 0.96])
def test_a_cut_last_frame_is_lost_and_no_other(share, tmp_path):
    pictures = noise(60)
    whole = faststart(film(pictures, g=10, bf=0))
    data = whole[: int(len(whole) * share)]
    with av.open(io.BytesIO(data), "r") as container, pytest.raises(av.error.InvalidDataError):
        list(container.decode(video=0))
    count = count_frames(data)
    assert 54 <= count < len(frame_times(data)) + 1 <= 61
    frames = ALL.video(data).numpy()
    assert numbers(frames, pictures_of(pictures))[:count] == list(range(count))
    assert (frames[count:] == frames[count - 1]).all()
    assert FrameReader(16, UniformSampler(8)).video(data).shape[0] == 8
    assert packed_and_verified(tmp_path, data, "a.mp4") == (1, [], 1)


def test_a_packet_that_cannot_be_decoded_costs_its_frame_alone(tmp_path):
    pictures, broken = noise(60), 27

    def damaged(listed: Listed) -> Listed:
        content, *rest = listed[broken]
        return [*listed[:broken], (bytes(len(content)), *rest), *listed[broken + 1 :]]

    data = film(pictures, "matroska", "mjpeg", "yuvj420p")
    data = rewritten(data, "matroska", damaged)
    with av.open(io.BytesIO(data), "r") as container, pytest.raises(av.error.InvalidDataError):
        list(container.decode(video=0))
    assert count_frames(data) == 59
    wanted = [number for number in range(60) if number != broken]
    assert numbers(some(data, wanted), pictures_of(pictures)) == wanted
    assert len(frame_times(reencode(data, 48))) == 59
    assert packed_and_verified(tmp_path, data, "a.mkv") == (1, [], 1)


def test_a_file_without_one_whole_frame_is_unreadable():
    """Nothing is skipped if nothing else is left."""
    data = film(noise(60), "matroska", "mjpeg", "yuvj420p")
    data = rewritten(data, "matroska", lambda listed: [(bytes(len(c)), *r) for c, *r in listed])
    for read in (count_frames, ALL.video):
        with pytest.raises(BadSampleError) as caught:
            read(data)
        assert caught.value.reason == "video_unreadable"


def packed_and_verified(folder, data: bytes, name: str) -> tuple[int, list[str], int]:
    """Returns what `pack` accepts, its reasons for others, and what `verify` accepts."""
    (folder / name).write_bytes(data)
    turns = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "noise"}]
    entries = [Annotation("a", {"video": name, "conversations": turns})]
    task = plan_shards(entries, folder / "out", 8)[0]
    outcome = pack_shard(task, Media(folder), None)
    good = verify_shard(str(task.path)).good if task.path.exists() else 0
    return outcome.good, [item.reason for item in outcome.bad], good


# --- parts of a video -----------------------------------------------------------------------------


def with_sound(pictures: Sequence[np.ndarray], container: str, sound: float, sight: float) -> bytes:
    """Returns a film of 10 frames per second. Pictures start at `sight`, silence at `sound`."""
    file, rate = io.BytesIO(), 16_000
    with av.open(file, "w", format=container) as out:
        video = out.add_stream("libx264", rate=10)
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt, video.options = "yuv420p", {"bf": "0", "threads": "1"}
        audio = out.add_stream("aac", rate=rate, layout="mono")
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(10 * sight) + number, Fraction(1, 10)
            out.mux(video.encode(frame))
        for number in range(len(pictures) * rate // 10_240):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.time_base = rate, Fraction(1, rate)
            silence.pts = round(sound * rate) + 1024 * number
            out.mux(audio.encode(silence))
        out.mux([*video.encode(), *audio.encode()])
    return file.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize(
    ("sound", "sight", "first"), [(0.0, 0.0, 20), (0.0, 1.5, 5), (1.0, 1.5, 15), (1.5, 0.0, 20)]
)
def test_a_part_counts_from_where_the_file_begins(container, sound, sight, first):
    """As `ffmpeg -ss 2 -t 1`: with the frame at second 2 and without the one at second 3."""
    pictures = noise(60)
    data = with_sound(pictures, container, sound, sight)
    part = reencode(data, 48, (2.0, 3.0))
    seen = numbers(ALL.video(part).numpy(), pictures_of(pictures))
    assert seen == list(range(first, first + 10))


def test_parts_that_follow_one_another_share_no_frame():
    """No frame is lost between two parts, whatever the rounding of the times."""
    pictures = noise(60)
    for rate in (Fraction(10), Fraction(30_000, 1001)):
        for container in ("mp4", "matroska"):
            data = film(pictures, container, rate=rate, bf=0)
            ends = [0.0, 0.3, 0.7, 1.1, 1.9, 6.0]
            parts = [reencode(data, 48, span) for span in pairwise(ends)]
            seen = [n for p in parts for n in numbers(ALL.video(p).numpy(), pictures_of(pictures))]
            assert seen == list(range(60))
