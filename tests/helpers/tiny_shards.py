"""Writes shards for tests: members that hold their own names, good samples, and bad samples."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from datamodules.instruct import InstructDataModule
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import make_sample, write_shards
from datamodules.stream.order import StreamOptions
from datamodules.visuals.frames import FrameReader, UniformSampler

COUNTS = [9, 4, 7]  # good samples in each shard; their numbers continue from shard to shard


def tar_bytes(members: Iterable[tuple[str, bytes]], form: int = tarfile.DEFAULT_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sample_tar(
    samples: Iterable[tuple[str, dict[str, bytes]]], form: int = tarfile.DEFAULT_FORMAT
) -> bytes:
    """Returns a tar of samples, given as (key, members by suffix)."""
    return tar_bytes([(f"{k}.{suffix}", d) for k, s in samples for suffix, d in s.items()], form)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def sample_members(shard: int, count: int) -> list[tuple[str, bytes]]:
    """Returns members of samples, two each. A member holds its name and takes one block."""
    keys = [f"s{shard}-{n:04d}" for n in range(count)]
    return [(f"{key}.{suffix}", f"{key} {suffix}".encode() * 9) for key in keys for suffix in
            ("json", "mp4")]  # fmt: skip


def write_named_shards(folder: Path) -> list[Path]:
    """Writes `0.tar` to `4.tar` of `sample_members`, 112 samples in total, without indexes."""
    counts = [23, 1, 40, 17, 31]
    return [write_tar(folder / f"{n}.tar", sample_members(n, c)) for n, c in enumerate(counts)]


def write_spoilt_shards(folder: Path) -> Path:
    """Writes `COUNTS` samples: 4 has a bad video, 10 has bad JSON, 15 has one slot too many."""
    write_shards(folder, COUNTS)
    two_slots = json.loads(make_sample(15)["json"])
    two_slots["conversations"][0]["value"] = "<image><image>"
    spoil(folder, shard=0, sample=4, members={"mp4": b"\0" * 99})
    spoil(folder, shard=1, sample=1, members={"json": b"{"})
    spoil(folder, shard=2, sample=2, members={"json": json.dumps(two_slots).encode()})
    return folder


def spoil(folder: Path, *, shard: int, sample: int, members: dict[str, bytes]) -> None:
    """Writes one shard again with changed members of one sample."""
    first = sum(COUNTS[:shard])
    samples = [(f"{n:09d}", make_sample(n)) for n in range(first, first + COUNTS[shard])]
    samples[sample][1].update(members)
    write_shard(folder / f"shard-{shard:06d}.tar", samples)


def data(train, val=None, **options) -> InstructDataModule:
    """Makes a datamodule. `options` are those of the stream, and batch sizes."""
    names = ("batch_size", "global_batch_size")
    settings = {"batch_size": 2} | {name: options.pop(name) for name in names if name in options}
    settings["stream"] = StreamOptions(**{"seed": 1, **options})
    frames = FrameReader(32, UniformSampler(4))
    return InstructDataModule(train, val, frames, ConversationEncoder, **settings)
