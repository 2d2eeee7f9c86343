"""Every kind of bad data: its reason, and that all other samples keep their places."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datamodules.instruct import decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.synthetic import draw_frames, encode_image, make_sample
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import EpochStream, Faults, StreamLoader
from datamodules.stream.order import ShuffledOrder, StreamOptions
from datamodules.visuals.frames import FrameReader, UniformSampler
from tests.helpers.hostile import CLIP, audio_alone, gif_bomb, with_frames, with_sps
from tests.helpers.tiny_shards import sample_tar

COUNT = 12  # samples of each of the two shards
BAD = 4  # the sample that is broken: a video


def shard_samples(shard: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"s{shard}-{n:02d}", make_sample(100 * shard + n)) for n in range(COUNT)]


@pytest.fixture(scope="module")
def samples() -> list[list[tuple[str, dict[str, bytes]]]]:
    return [shard_samples(0), shard_samples(1)]


@pytest.fixture(scope="module")
def decode() -> Callable:
    read = FrameReader(16, UniformSampler(2))
    return partial(decode_sample, frames=read, conversation=ConversationEncoder(max_length=256))


def stream_keys(paths: list, decode: Callable, **options) -> tuple[list[str], Faults]:
    """Returns the keys of an epoch in the order of training."""
    manifest = read_manifest([str(path) for path in paths], **options)
    order = ShuffledOrder(manifest, 1, StreamOptions(seed=1, virtual_streams=1, window=6, chunk=3))
    faults = Faults("skip")
    loader = StreamLoader(
        lambda epoch: EpochStream(manifest, order.epoch(epoch), decode, list, 5.0), order, faults
    )
    return [sample.key.rpartition("/")[2] for (sample,) in loader], faults


def conversation(*turns, **fields) -> bytes:
    return json.dumps({"conversations": list(turns), **fields}).encode()


ASK = {"from": "human", "value": "<video>\nWhat?"}
ANSWER = {"from": "gpt", "value": "That."}
LONE = rb'{"conversations": [{"from": "human", "value": "<video>\ud800"}, '
LONE += rb'{"from": "gpt", "value": "x"}]}'

# replacements of a good video or conversation, with the expected reason
VIDEOS = {
    "empty": (b"", "video_empty"),
    "cut in its head": (CLIP[:40], "video_unreadable"),
    "cut": (CLIP[: len(CLIP) // 2], "video_unreadable"),
    "zeroed head": (bytes(60) + CLIP[60:], "video_unreadable"),
    "no video": (b"no video" * 100, "video_unreadable"),
    "an image": (encode_image(draw_frames(0, 1)[0][0]), "not_a_video"),
    "audio alone": (audio_alone(), "not_a_video"),
    "a playlist": (b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n", "video_unreadable"),
    "a concatenation": (b"ffconcat version 1.0\nfile /etc/passwd\n", "video_unreadable"),
    "zero frames": (with_frames(0), "video_empty"),
    "60,000 x 60,000": (with_sps(60_000), "video_unreadable"),  # more than FFmpeg needs by itself
    "16,000 x 16,000": (with_sps(16_000), "video_too_large"),
    "10,000 frames of nothing": (
        with_frames(10_000),
        "video_too_large",
    ),  # by the files that the bytes can be
    "a gif of 65,535 x 65,535": (gif_bomb(), "video_unreadable"),
}
JSONS = {
    "no json": (b"", "bad_json"),
    "cut json": (conversation(ASK, ANSWER)[:-9], "bad_json"),
    "binary": (CLIP[:300], "bad_json"),
    "no utf-8": (b'{"conversations": "\xff\xfe"}', "bad_json"),
    "half a character": (LONE, "bad_json"),
    "nested": (b"[" * 200_000, "bad_json"),
    "a huge number": (b'{"conversations": ' + b"9" * 5000 + b"}", "bad_json"),
    "17 MB": (b'{"conversations": [%s]}' % (b" " * (17 << 20)), "too_long"),
    "3,000 turns": (conversation(ASK, *[ANSWER] * 3_000), "too_long"),
    "null": (b"null", "missing_field"),
    "a list": (b"[1]", "missing_field"),
    "another type": (conversation(), "empty_conversation"),
    "turns of another type": (b'{"conversations": {"a": 1}}', "empty_conversation"),
    "a turn of another type": (conversation(7, ANSWER), "missing_field"),
    "a text of another type": (conversation({"from": "human", "value": 7}), "missing_field"),
    "a role of another type": (conversation({"from": {}, "value": ""}), "unknown_role"),
    "no answer": (conversation(ASK), "empty_conversation"),
    "no slot": (conversation({"from": "human", "value": "?"}, ANSWER), "slot_mismatch"),
}


@pytest.mark.parametrize("name", [*VIDEOS, *JSONS])
def test_a_bad_member_has_a_reason_and_no_other_sample_moves(name, samples, decode, tmp_path):
    suffix, (data, reason) = ("mp4", VIDEOS[name]) if name in VIDEOS else ("json", JSONS[name])
    key, good = samples[0][BAD]
    assert_only(samples, (key, {**good, suffix: data}), reason, decode, tmp_path)


@pytest.mark.parametrize(
    ("lost", "reason"), [("mp4", "slot_mismatch"), ("json", "missing_field")], ids=lambda x: x
)
def test_a_missing_member_has_a_reason(lost, reason, samples, decode, tmp_path):
    key, good = samples[0][BAD]
    members = {suffix: data for suffix, data in good.items() if suffix != lost}
    assert_only(samples, (key, members), reason, decode, tmp_path)


def assert_only(samples, broken, reason: str, decode: Callable, folder: Path) -> None:
    """With one broken sample, all others come at the same places as without damage."""
    paths = [folder / "0.tar", folder / "1.tar"]
    for path, content in zip(paths, samples, strict=True):
        path.write_bytes(sample_tar(content))
    whole, none = stream_keys(paths, decode)
    assert sorted(whole) == [key for shard in samples for key, _ in shard]
    assert not none.counts
    content = [*samples[0][:BAD], broken, *samples[0][BAD + 1 :]]
    (folder / "0.tar.idx").unlink()
    paths[0].write_bytes(sample_tar(content))
    left, faults = stream_keys(paths, decode)
    assert faults.counts == {reason: 1}
    assert [b for a, b in zip(whole, left, strict=True) if a != broken[0]] == [
        key for key in whole if key != broken[0]
    ]
    assert broken[0] not in left


def test_nothing_of_a_shard_is_executed_or_followed(samples, decode, tmp_path):
    """Pickles stay bytes. Links, devices and paths that lead out make a sample bad."""
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    evil = pickle.dumps(Trap())
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for suffix, data in {"pyd": evil, "pkl": evil, "pth": evil, **samples[0][0][1]}.items():
            info = tarfile.TarInfo(f"a.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            key = f"link{int(kind)}"
            for suffix, data in samples[0][0][1].items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(f"{key}.0.jpg")
            info.type, info.linkname = kind, str(tmp_path / "secret")
            tar.addfile(info)
        for name in ("/etc/b.json", "c/../../d.json"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    (tmp_path / "0.tar").write_bytes(file.getvalue())
    keys, faults = stream_keys([tmp_path / "0.tar"], decode)
    assert set(keys) == {"a"}
    assert faults.counts == {"unsafe_member": 2, "link_member": 4}
    assert not trap.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"]


# --- shards --------------------------------------------------------------------------------------

MIDDLE = 5  # number of the sample at which a shard is damaged


def offsets_of(data: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member.offset for member in tar}


def flip_checksum(data: bytes, at: int) -> bytes:
    return data[: at + 150] + b"x" + data[at + 151 :]


def claim_more(data: bytes, at: int) -> bytes:
    """Returns a header with a correct checksum that claims the next samples as its payload."""
    info = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict")
    info.size += 1 << 20
    return data[:at] + info.tobuf(tarfile.GNU_FORMAT) + data[at + 512 :]


def with_negative_size(data: bytes, at: int) -> bytes:
    info = tarfile.TarInfo("x.json")
    info.pax_headers = {"size": "-4096"}
    return data[:at] + info.tobuf(tarfile.PAX_FORMAT) + data[at:]


def with_long_names(data: bytes, at: int) -> bytes:
    """Returns a chain of headers, each with the name of the next."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    return data[:at] + (info.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 300 + data[at:]


DAMAGE = {
    "a header": (flip_checksum, "tar_corrupt"),
    "zeros": (lambda data, at: data[:at] + bytes(2048) + data[at + 2048 :], "tar_corrupt"),
    "noise": (lambda data, at: data[:at] + b"\xa5" * 999 + data[at + 999 :], "tar_corrupt"),
    "noise between": (lambda data, at: data[:at] + b"\xa5" * 777 + data[at:], "tar_corrupt"),
    "a lost piece": (lambda data, at: data[: at - 300] + data[at + 900 :], "tar_corrupt"),
    "a claim": (claim_more, "tar_corrupt"),
    "a negative size": (with_negative_size, "tar_corrupt"),
    "long names": (with_long_names, "tar_corrupt"),
    "another tar behind": (
        lambda data, at: data[:at] + bytes(1024) + data[at:],
        "tar_corrupt",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_a_shard_costs_only_what_it_touches(name, samples, decode, tmp_path):
    """The samples before and after the damage are read, also through a pipe."""
    damage, reason = DAMAGE[name]
    data = sample_tar(samples[0])
    key = samples[0][MIDDLE][0]
    at = offsets_of(data)[f"{key}.{next(iter(samples[0][MIDDLE][1]))}"]
    path = tmp_path / "0.tar"
    path.write_bytes(damage(data, at))
    touched = {key, samples[0][MIDDLE - 1][0] if name == "a lost piece" else key}
    keys = {key for key, _ in samples[0]} - touched
    for url in (str(path), f"pipe:cat {path}"):
        if url != str(path) and name == "a claim":
            continue  # a pipe has passed the claimed bytes when the claim turns out wrong
        manifest = read_manifest(url)
        assert [fault.reason for fault in manifest.faults] == [reason]
        left, faults = stream_keys([url], decode)
        assert keys <= set(left)
        assert set(left) <= keys | touched
        assert faults.counts.total() <= 3
    assert not (tmp_path / "0.tar.idx").exists()


def test_an_index_that_lies_is_no_crash(samples, decode, tmp_path):
    """Stored offsets that go back or far past the end cost their samples, but no memory."""
    path, index = tmp_path / "0.tar", tmp_path / "0.tar.idx"
    path.write_bytes(sample_tar(samples[0]))
    read_manifest(str(path))
    entries = np.fromfile(index, "<u8")
    entries[3], entries[7] = 2**62, 0
    index.write_bytes(entries.tobytes())
    keys, faults = stream_keys([path], decode)
    lost = {2, 3, 6, 7}
    assert set(keys) >= {key for n, (key, _) in enumerate(samples[0]) if n not in lost}
    assert set(faults.counts) == {"tar_truncated", "index_stale", "tar_corrupt"}
