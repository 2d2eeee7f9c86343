"""Frames: which are chosen, that seeking changes nothing, and what is refused."""

import io
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from datamodules.batch import VisualInfo
from datamodules.errors import BadSampleError
from datamodules.visuals.frames import FpsSampler, FrameReader, SpacedSampler, UniformSampler
from datamodules.visuals.images import open_image
from datamodules.visuals.videos import count_frames


def ramp_video(
    frames: int = 60, gop: int = 12, container: str = "mp4", bf: int = 2, size=(128, 96)
) -> bytes:
    """Makes a video in which frame n is grey with value 4 n, up to n = 63."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": str(gop), "bf": str(bf), "sc_threshold": "0"}
        for n in range(frames):
            pixels = np.full((size[1], size[0], 3), 4 * n % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def jpeg(size=(50, 40), **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "mov"])
@pytest.mark.parametrize("gop", [4, 12, 250])
def test_frames_are_those_of_a_full_decode(container, gop):
    """However the reader seeks, frame n is the n-th frame of plain decoding."""
    data = ramp_video(container=container, gop=gop)
    wanted = [0, 1, 17, 18, 40, 59]
    frames = FrameReader(16, lambda times: wanted).video(data)
    with av.open(io.BytesIO(data), "r") as plain:
        expected = [frame.to_ndarray(format="rgb24")[40, 40, 0] for frame in plain.decode(video=0)]
    assert frames.shape == (6, 3, 16, 16)
    assert len(expected) == 60
    got = frames[:, 0, 8, 8].numpy().astype(int)
    assert np.abs(got - np.array(expected, dtype=int)[wanted]).max() <= 2  # less than half a step


def test_frames_wanted_twice_come_twice():
    frames = FrameReader(8, lambda times: [3, 3, 9]).video(ramp_video(12))
    assert (frames[0] == frames[1]).all()
    assert (frames[1] != frames[2]).any()


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_a_video_says_when_its_frames_are_shown_and_an_image_does_not(container):
    """15 frames per second. mpegts does not begin at time 0, which must not change the result."""
    reader = FrameReader(8, lambda times: [0, 3, 30, 30])
    data = ramp_video(container=container)
    seconds = reader.read("k.mp4", data).info.seconds
    with av.open(io.BytesIO(data), "r") as plain:
        shown = [frame.time for frame in plain.decode(video=0)]
    assert seconds == pytest.approx([shown[0], shown[3], shown[30], shown[30]], abs=1e-4)
    assert seconds[1] - seconds[0] == pytest.approx(3 / 15, abs=1e-4)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    assert reader.read("k.png", file.getvalue()).info == VisualInfo()


def test_uniform_keeps_both_ends_and_its_number():
    assert UniformSampler(4)([n / 5 for n in range(10)]) == [0, 3, 6, 9]
    assert UniformSampler(4)([0.0, 0.1]) == [0, 0, 1, 1]
    assert UniformSampler(1)([0.0, 0.1, 0.2]) == [0]


def test_fps_takes_the_nearest_frame_of_each_tick():
    times = (np.arange(100) / 25).tolist()  # 4 seconds
    assert FpsSampler(2.0, 100)(times) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert FpsSampler(2.0, 4)(times) == UniformSampler(4)(times)
    assert FpsSampler(2.0, 100, min_frames=10)(times) == UniformSampler(10)(times)
    assert FpsSampler(60.0, 1000)(times) == list(range(100))  # not more than there are
    assert FpsSampler(2.0, 4)([0.0]) == [0]
    gap = [0.0, 0.1, 0.2, 5.0, 5.1]  # frames are not evenly spaced in every file
    assert FpsSampler(1.0, 100)(gap) == UniformSampler(5)(gap)
    assert FpsSampler(0.5, 100)(gap) == [0, 2, 3]


def test_spaced_takes_multiples_from_first_to_last():
    times = (np.arange(100) / 25).tolist()  # 4 seconds
    assert SpacedSampler(2.0, 128)(times) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert SpacedSampler(2.0, 128, rounding="round")(times) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert SpacedSampler(2.0, 5)(times) == [0, 33, 66, 99]
    assert SpacedSampler(0.1, 128, min_frames=5, factor=3)(times) == [0, 19, 39, 59, 79, 99]
    assert SpacedSampler(2.0, 128)(times[:10]) == [0, 9]  # under one second
    assert SpacedSampler(2.0, 128)([0.0]) == [0, 0]
    assert SpacedSampler(2.0, 128, 4)([0.0, 0.1, 0.2]) == [0, 2]  # not more than there are
    milliseconds = [round(n / 30, 3) for n in range(300)]  # Matroska has no smaller unit
    assert len(SpacedSampler(2.0, 128)(milliseconds)) == 20


SAMPLERS = [
    UniformSampler(5),
    FpsSampler(2.0, 9, 2),
    FpsSampler(30.0, 6),
    *(
        SpacedSampler(fps, most, least, factor, rounding)
        for rounding in ("truncate", "round")
        for fps, most, least, factor in [(2.0, 128, 1, 2), (3.7, 21, 4, 2), (1.0, 50, 7, 5)]
    ),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_the_count_is_that_of_the_sampled_frames(sampler):
    """Also of videos with uneven times. Frames never decrease, and lie within the video."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        frames = int(np.exp(rng.uniform(0, 6)))
        times = np.sort(rng.uniform(0, frames / 10, frames))
        if rng.random() < 0.5:
            times = np.arange(frames) / rng.choice([5, 23.976, 24, 29.97, 30])
        wanted = sampler(times.tolist())
        seconds = times[-1] - times[0]
        assert len(wanted) == sampler.count(np.array([frames]), np.array([seconds]))[0]
        assert wanted == sorted(wanted)
        assert 0 <= wanted[0] <= wanted[-1] < frames
        if isinstance(sampler, SpacedSampler):
            assert len(wanted) % sampler.factor == 0
            assert (wanted[0], wanted[-1]) == (0, frames - 1)
            assert len(wanted) <= max(min(sampler.max_frames, frames), sampler.factor)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.0, 4), "set fps above 0"),
        ((1.0, 4, 5), "max_frames 4: set fps above 0, factor to 1 or more and 1 <= min_frames"),
        ((1.0, 4, 1, 0), "factor 0, .*factor to 1 or more"),
        ((1.0, 5, 5), "no multiple of factor=2 lies between min_frames=5 and max_frames=5"),
        ((1.0, 4, 1, 2, "floor"), "rounding is floor; set truncate or round"),
    ],
)
def test_spaced_refuses_what_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=says):
        SpacedSampler(*arguments)


@pytest.mark.parametrize("arguments", [(0.0, 4), (1.0, 0), (1.0, 4, 5)])
def test_samplers_refuse_what_cannot_be(arguments):
    with pytest.raises(ValueError, match="set fps above 0"):
        FpsSampler(*arguments)


def test_resizing_keeps_the_mean():
    rng = np.random.RandomState(0)
    picture = rng.randint(0, 255, (96, 128, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    frame = FrameReader(8, UniformSampler(1)).image(file.getvalue())[0]
    means = picture.reshape(8, 12, 8, 16, 3).mean((1, 3))
    assert np.abs(frame.permute(1, 2, 0).numpy() - means).mean() < 8  # taking pixels: about 60


def reason_of(call, *arguments) -> str:
    with pytest.raises(BadSampleError) as caught:
        call(*arguments)
    return caught.value.reason


def test_broken_videos_have_a_reason():
    good = ramp_video(30)
    read = FrameReader(16, UniformSampler(4)).video
    playlist = b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    for data, reason in (
        (b"", "video_empty"),
        (good[: len(good) // 2], "video_unreadable"),
        (b"\0" * 200 + good[200:], "video_unreadable"),
        (b"no video" * 100, "video_unreadable"),
        (playlist, "video_unreadable"),  # would open the file that it names
        (jpeg(), "not_a_video"),
        (ramp_video(90, container="matroska")[:2500], "video_truncated"),
    ):
        assert reason_of(read, data) == reason
        assert reason_of(count_frames, data) == reason


def test_a_video_cut_behind_its_head_is_truncated(tmp_path):
    """The index is at the front: the file opens, but its last frames are missing."""
    path, options = tmp_path / "a.mp4", {"movflags": "faststart"}
    with (
        av.open(io.BytesIO(ramp_video(60, bf=0)), "r") as source,
        av.open(str(path), "w", options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    assert count_frames(data) == 60
    read = FrameReader(16, UniformSampler(4)).video
    assert reason_of(read, data[: len(data) * 2 // 3]) == "video_truncated"


def test_audio_alone_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    assert reason_of(FrameReader(16, UniformSampler(4)).video, file.getvalue()) == "not_a_video"


def test_sizes_above_the_limit_are_refused_before_decoding():
    reader = FrameReader(16, UniformSampler(2), max_pixels=128 * 95)
    assert reason_of(reader.video, ramp_video(4)) == "video_too_large"
    assert reason_of(reader.image, jpeg((200, 100))) == "image_too_large"
    assert reason_of(open_image, png_bomb(60_000)) == "image_too_large"


def png_bomb(side: int) -> bytes:
    """Returns a few bytes that claim side * side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def test_images():
    reader = FrameReader(16, UniformSampler(4))
    frame = reader.image(jpeg())
    assert frame.shape == (1, 3, 16, 16)
    assert np.abs(frame[0, :, 8, 8].numpy().astype(int) - [200, 30, 60]).max() <= 3
    assert reason_of(reader.image, jpeg()[:300]) == "image_unreadable"
    assert reason_of(reader.image, b"") == "image_unreadable"
    assert reason_of(reader.image, b"%!PS-Adobe-3.0 EPSF-3.0\n") == "image_unreadable"
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    file = io.BytesIO()
    half = Image.new("L", (40, 40))
    half.paste(255, (0, 0, 40, 20))  # white above
    half.save(file, "JPEG", exif=turned)
    shown = reader.image(file.getvalue())[0, 0]
    assert shown[8, 14] > 250  # white on the right
    assert shown[8, 1] < 5


def test_metadata_that_cannot_be_read_cost_no_picture():
    """Tags with text in an old encoding, and an Exif block of noise."""
    titled = io.BytesIO()
    with av.open(io.BytesIO(ramp_video(12)), "r") as source, av.open(titled, "w", "mp4") as target:
        target.metadata["title"] = "TITLE"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = titled.getvalue()
    assert data.count(b"TITLE") == 1
    reader = FrameReader(16, UniformSampler(4))
    old = reader.video(data.replace(b"TITLE", b"T\xecTL\xe9"))
    assert (old == reader.video(data)).all()
    noisy = jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xa5" * 99)
    assert (reader.image(noisy) == reader.image(jpeg())).all()
