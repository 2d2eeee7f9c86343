"""Clips and needles from shards: what is read, and the messages for bad ones."""

import pytest

from datamodules.errors import BadSampleError
from datamodules.haystack.needle import read_clips, read_needles
from datamodules.shards.demo import write_demo
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import draw_frames, encode_image
from datamodules.stream.index import index_path
from datamodules.visuals.frames import FpsSampler, FrameReader

ENTRY = (
    b'{"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]}'
)


@pytest.mark.parametrize(
    ("read", "members", "reason"),
    [
        (read_clips, {"json": b"{}"}, "not_a_video"),
        (read_clips, {"mp4": b"no film"}, "video_unreadable"),
        (read_needles, {"jpg": b""}, "missing_field"),
        (read_needles, {"jpg": b"", "json": b"{"}, "bad_json"),
        (
            read_needles,
            {"json": ENTRY.replace(b"<image>", b"")},
            "not_a_needle",
        ),
        (
            read_needles,
            {"jpg": b"no picture", "json": ENTRY},
            "image_unreadable",
        ),
    ],
)
def test_a_bad_sample_is_named_by_shard_and_key(read, members, reason, tmp_path):
    write_shard(tmp_path / "bad.tar", [("some-key", members)])
    with pytest.raises(BadSampleError) as caught:
        read(str(tmp_path / "bad.tar"), FrameReader(32, FpsSampler(25.0, 100)))
    assert caught.value.reason == reason
    assert caught.value.key == "some-key"
    assert caught.value.shard == str(tmp_path / "bad.tar")


def test_needles_that_all_ask_the_same_distract_nobody(tmp_path):
    reader = FrameReader(32, FpsSampler(25.0, 100))
    picture = encode_image(draw_frames(0, 1, 32)[0][0])
    write_shard(tmp_path / "same.tar", [(str(n), {"jpg": picture, "json": ENTRY}) for n in "ab"])
    with pytest.raises(ValueError, match="at least two questions"):
        read_needles(str(tmp_path / "same.tar"), reader)


def test_the_demo_writes_what_is_read(tmp_path):
    pytest.importorskip("sklearn")
    write_demo(tmp_path)
    reader = FrameReader(32, FpsSampler(25.0, 12))
    assert [len(clip) for clip in read_clips(str(tmp_path / "haystack-test.tar"), reader)] == [12]
    cards = read_needles(str(tmp_path / "needles-test.tar"), reader)
    assert len(cards) == 360
    assert len({card.question for card in cards}) == 8


def test_a_shard_cut_behind_its_index_is_named(tmp_path):
    path = tmp_path / "needles.tar"
    write_shard(path, [(f"{n}", {"jpg": encode_image(draw_frames(n, 1)[0][0])}) for n in range(3)])
    path.write_bytes(path.read_bytes()[:-3000])  # its index says something else
    index_path(path).touch()
    with pytest.raises(BadSampleError) as error:
        read_needles(str(path), FrameReader(32, FpsSampler(1.0, 1)))
    assert error.value.shard == str(path)
    assert error.value.key
