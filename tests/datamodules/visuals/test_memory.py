"""Memory of reading: one copy of the frames, and no limit that affects other threads."""

import io
import re
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from datamodules.errors import BadSampleError
from datamodules.instruct import collate, decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.synthetic import make_sample
from datamodules.visuals import container, videos
from datamodules.visuals.container import MAX_BYTES, check_memory, open_video
from datamodules.visuals.frames import FrameReader, UniformSampler
from datamodules.visuals.headers import check_claims, missing_bytes
from tests.helpers.films import film, noise
from tests.helpers.hostile import with_frames

READER = FrameReader(16, UniformSampler(4))


def peak(run: Callable[[], object]) -> int:
    """Returns the maximum bytes by which the process grows while this runs (Linux)."""
    status = Path("/proc/self/status")

    def read(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def test_frames_are_held_once():
    data = film(noise(300), g=50)
    reader = FrameReader(384, UniformSampler(300))
    READER.video(data)  # what the first video costs
    size = 300 * 3 * 384 * 384
    kept = []
    assert peak(lambda: kept.append(reader.video(data))) < 1.4 * size  # 3.1 with three copies
    assert kept[0].is_contiguous()
    assert kept[0].untyped_storage().nbytes() == size


def test_a_batch_of_one_visual_holds_the_frames_of_its_sample():
    raw = {"__key__": "k", "__url__": "u", **make_sample(0)}
    sample = decode_sample(raw, READER, ConversationEncoder())
    options = {"pad_id": 0, "prompt_pad_id": 0}
    assert collate([sample], **options).pixels.data_ptr() == sample.visuals[0].frames.data_ptr()
    both = collate([sample, sample], **options)
    frames = sample.visuals[0].frames
    assert all(torch.equal(visual.frames, frames) for visual in both.visuals)
    assert len(both.visuals) == 2


def test_another_thread_may_reserve_what_it_likes(monkeypatch):
    """The limits of one video do not apply to the process or to other videos."""
    limits, check = [], videos.check_memory

    def reserve(*of) -> None:
        np.empty(MAX_BYTES + (1 << 30), np.uint8)  # never touched
        limits.append(resource.getrlimit(resource.RLIMIT_DATA))
        check(*of)

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(videos, "check_memory", reserve)
    assert READER.video(film(noise(12))).shape[0] == 4
    assert set(limits) == {before}


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(BadSampleError) as caught:
        call()
    return f"{caught.value.reason}: {caught.value.detail}"


# --- what a file claims ---------------------------------------------------------------------------


def box(kind: bytes, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def fragmented(samples: int | None = None) -> bytes:
    """Returns an MP4 of fragments; the first claims this number of samples."""
    file = film(noise(12), muxer={"movflags": "frag_keyframe+empty_moov"}, g=4, bf=0)
    data = bytearray(file)
    if samples is not None:
        struct.pack_into(">I", data, data.index(b"trun") + 8, samples)
    return bytes(data)


def compressed(data: bytes, claimed: int | None = None) -> bytes:
    """Returns an MP4 header as QuickTime compresses it; `moov` is the last box."""
    at = data.index(b"moov") - 4
    head = data[at:]
    size = (len(head) if claimed is None else claimed).to_bytes(4, "big")
    inner = box(b"dcom", b"zlib") + box(b"cmvd", size + zlib.compress(head))
    return data[:at] + box(b"moov", box(b"cmov", inner))


def long_sound() -> bytes:
    """Returns a MOV with compressed sound in QuickTime's count: 34 bytes hold 64 samples.

    The tables say one byte per sample. FFmpeg writes packets, so the tables are changed here.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as out:
        picture = out.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        stream = out.add_stream("adpcm_ima_qt", rate=8000, layout="mono")
        for content in noise(12):
            out.mux(picture.encode(av.VideoFrame.from_ndarray(content, format="rgb24")))
        out.mux(picture.encode())
        for n in range(3000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 64), np.int16), "s16p", "mono")
            frame.sample_rate, frame.pts = 8000, 64 * n
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    data = bytearray(file.getvalue())
    struct.pack_into(">II", data, data.rindex(b"stsz") + 8, 1, 3000 * 64)
    struct.pack_into(">II", data, data.rindex(b"stts") + 12, 3000 * 64, 1)
    at = data.rindex(b"stsc") + 8
    for n in range(int.from_bytes(data[at : at + 4], "big")):
        place = at + 8 + 12 * n
        (packets,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", data, place, packets * 64)
    assert len(data) < 3000 * 64
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_frames(80_000_000),
        lambda: fragmented(2_000_000_000),
        lambda: compressed(with_frames(80_000_000)),
        lambda: compressed(film(noise(3)), claimed=1 << 31),
    ],
    ids=["table", "fragment", "compressed table", "compressed header"],
)
def test_claims_of_samples_are_refused_before_they_cost_memory(make):
    data = make()
    said: list[str] = []
    grown = peak(lambda: said.append(reason(lambda: READER.video(data))))
    assert said[0].startswith("video_too_large")
    assert grown < 16 << 20


@pytest.mark.parametrize(
    "make",
    [fragmented, lambda: compressed(film(noise(12))), long_sound],
    ids=["fragments", "compressed header", "compressed sound"],
)
def test_honest_files_of_these_kinds_are_read(make):
    assert READER.video(make()).shape[0] == 4


def test_ffmpeg_reserves_no_block_that_is_too_large(monkeypatch):
    """The second check catches a claim that the first did not look at."""
    monkeypatch.setattr(container, "check_claims", lambda data: None)
    data = with_frames(80_000_000)
    said: list[str] = []
    assert peak(lambda: said.append(reason(lambda: READER.video(data)))) < 64 << 20
    assert said[0].split(":")[0] in ("video_empty", "video_too_large", "video_unreadable")


def test_frames_that_a_decoder_cannot_hold_are_refused():
    with open_video(film(noise(2))) as (_, stream):
        codec = stream.codec_context
        check_memory(codec, 7680, 4320, 12)  # 8K, as phones and cameras record it
        check_memory(codec, 7680, 4320, 24)  # the same with 10 bits
        assert "video_too_large" in reason(lambda: check_memory(codec, 7680, 4320, 48))
    mjpeg = film(noise(2), "avi", "mjpeg", "yuvj420p")
    with open_video(mjpeg) as (_, stream):  # each frame is coded by itself
        check_memory(stream.codec_context, 7680, 4320, 48)


# --- where a file ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_bytes_that_are_missing_are_counted(kind):
    codec = "libvpx" if kind == "webm" else "libx264"
    data = film(noise(12), kind, codec)
    assert missing_bytes(data) == 0
    for cut in (1, 100):
        assert missing_bytes(data[:-cut]) in (cut, cut - 1)  # AVI pads its last part
    assert missing_bytes(data + b"\0" * 100) == 0  # padded by a copy program


@pytest.mark.parametrize("data", [b"", b"RIFF", b"\x1a\x45\xdf\xa3", b"\0\0\0\1mdat", b"\0" * 99])
def test_heads_that_are_no_heads(data):
    assert missing_bytes(data) >= 0
    check_claims(data)
