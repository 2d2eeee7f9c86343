"""Samples in a tar: found, read by range, and refused at the right place."""

import contextlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import BadSampleError
from datamodules.stream.index import index_path, read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from tests.helpers.tiny_shards import write_named_shards, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_named_shards(tmp_path)


def test_index_has_the_layout_of_energon(tmp_path):
    """It has the first header of each sample, then the end of the last. Metadata do not count."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("__meta__/a.json"))
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/a.json", "d/a.0.jpg", "d/b.json", "long" * 40 + ".json", "no_suffix"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
        end = tar.offset
    manifest = read_manifest(str(path))
    entries = struct.unpack("<4Q", index_path(path).read_bytes())
    starts = [members[n].offset for n in ("d/a.json", "d/b.json", "long" * 40 + ".json")]
    assert list(entries) == [*starts, end]
    assert len(manifest) == 3


def test_ranges_equal_the_whole(shards):
    """A sample that is read by range equals the one from a plain pass over the tar."""
    manifest = read_manifest([str(path) for path in shards])
    reader = ShardReader(manifest, 30.0, keep_open=2)
    for number, path in enumerate(shards):
        with tarfile.open(path) as tar:
            plain = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore
        got = {}
        for i in reversed(range(manifest.shards[number].count)):
            raw = untar_sample(reader.read(number, i), "u")
            got |= {f"{raw['__key__']}.{s}": raw[s] for s in ("json", "mp4")}
        assert got == plain
    reader.close()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("/etc/a.json", b"{}")], "unsafe_member"),
        ([("x/../../a.json", b"{}")], "unsafe_member"),
        ([("a.json", b"{}"), ("a.json", b"{}")], "duplicate_member"),
        ([("a.json", b"{}"), ("a.JSON", b"{}")], "duplicate_member"),
    ],
)
def test_unsafe_members_are_refused(tmp_path, members, reason):
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    end = 1024 * len(members)
    with pytest.raises(BadSampleError) as caught:
        untar_sample(data[:end], "u")
    assert caught.value.reason == reason
    if reason == "duplicate_member":
        names = ", ".join(name for name, _ in members)
        assert caught.value.detail == f"a name stands twice in {names}"


def test_links_are_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.mp4", tarfile.SYMTYPE), ("a.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    manifest = read_manifest(str(path))
    reader = ShardReader(manifest, 30.0)
    with pytest.raises(BadSampleError, match=r"link_member: a.mp4, a symbolic link to /etc/passwd"):
        untar_sample(reader.read(0, 0), "u")
    reader.close()


def read_good(path):
    """Returns the samples that can still be read, by key. Every other sample must say its fault."""
    manifest = read_manifest(str(path))
    reader, good = ShardReader(manifest, 30.0), {}
    for i in range(manifest.shards[0].count):
        with contextlib.suppress(BadSampleError):
            sample = untar_sample(reader.read(0, i), "u")
            good[sample["__key__"]] = sample
    reader.close()
    return good, manifest.faults


def test_random_damage_never_crashes_or_hangs(shards):
    """A shard that is only cut keeps all samples before the cut unchanged."""
    whole = shards[0].read_bytes()
    all_good, faults = read_good(shards[0])
    assert all_good
    assert not faults
    rng = np.random.RandomState(0)
    for _ in range(60):
        data = bytearray(whole[: rng.randint(1, len(whole))])
        flips = rng.randint(4)
        for _ in range(flips):
            data[rng.randint(len(data))] = rng.randint(256)
        shards[0].write_bytes(bytes(data))
        index_path(shards[0]).unlink(missing_ok=True)
        good, faults = read_good(shards[0])
        assert len(good) <= len(all_good)
        if not flips:
            *before, last = [*good.items()] or [(None, {})]
            assert before == [(key, all_good[key]) for key, _ in before]
            # A cut between members looks like the end. Decoding reports what the last sample lacks.
            assert last[1].items() <= all_good.get(last[0], {}).items()
