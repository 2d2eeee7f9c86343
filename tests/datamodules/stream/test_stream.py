"""The stream over shards: indexes, order after faults, and every way in which a shard can break."""

import gzip
import os
from pathlib import Path

import pytest

from datamodules.errors import BadSampleError
from datamodules.stream.index import expand_urls, index_path, read_manifest
from datamodules.stream.loader import EpochStream, Faults, StreamLoader
from datamodules.stream.order import FileOrder, ShuffledOrder, StreamOptions
from tests.helpers.tiny_shards import sample_members, write_named_shards, write_tar

OPTIONS = StreamOptions(seed=3, virtual_streams=12, window=5, chunk=3)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_named_shards(tmp_path)


def stream(
    paths,
    *,
    epoch=0,
    mbs=2,
    per_step=2,
    options=OPTIONS,
    decode=lambda raw: raw["__key__"],
    **where,
):
    """Returns (loader, faults) over raw shards. A batch is the list of its keys."""
    timeout_s = options.timeout_s
    manifest = read_manifest([str(path) for path in paths], timeout_s=timeout_s)
    order = ShuffledOrder(manifest, mbs, options, per_step)
    faults = Faults("skip")
    loader = StreamLoader(
        lambda e: EpochStream(manifest, order.epoch(e), decode, list, timeout_s),
        order,
        faults,
        position=lambda: (epoch, where.pop("done", 0)),
        **{name: value for name, value in where.items() if name != "done"},
    )
    return loader, faults


def batches(paths, **options) -> list[list[str]]:
    return list(stream(paths, **options)[0])


def in_global_order(paths, world: int, workers: int, **options) -> list[list[str]]:
    ranks = [
        batches(paths, rank=rank, world=world, num_workers=workers, **options)
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    return [batch for row in zip(*ranks, strict=True) for batch in row]


# --- index and reading ---------------------------------------------------------------------------


def test_index_of_a_read_only_folder_goes_to_the_cache(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", _refuse_below(shards[0].parent))
    cache = tmp_path.parent / f"{tmp_path.name}-cache"
    manifest = read_manifest(str(shards[0]), cache=cache)
    assert not index_path(shards[0]).exists()
    assert manifest.shards[0].index is not None
    assert manifest.shards[0].index.parent == cache
    assert read_manifest(str(shards[0]), cache=cache) == manifest


def _refuse_below(folder: Path):
    replace = os.replace

    def refuse(source, target):
        if Path(target).parent == folder:
            raise PermissionError(13, "read-only")
        replace(source, target)

    return refuse


def test_index_of_a_replaced_shard_is_made_again(shards):
    read_manifest(str(shards[1]))
    write_tar(shards[1], sample_members(7, 9))
    assert len(read_manifest(str(shards[1]))) == 9


def test_patterns(shards, tmp_path):
    everything = [str(path) for path in shards]
    assert expand_urls(str(tmp_path)) == everything
    assert expand_urls(str(tmp_path / "*.tar")) == everything
    assert expand_urls(str(tmp_path / "{0..4}.tar")) == everything
    assert expand_urls("pipe:cat /x/{a,b}.tar") == ["pipe:cat /x/a.tar", "pipe:cat /x/b.tar"]
    assert expand_urls(["http://h/{00..01}.tar"]) == ["http://h/00.tar", "http://h/01.tar"]
    for bad, advice in (
        ("nothing-*.tar", "no file matches"),
        ("nowhere://bucket/a.tar", "Protocol not known: nowhere"),
        ([], "no shards given"),
    ):
        with pytest.raises(ValueError, match=advice):
            expand_urls(bad)


def test_pipes_give_the_same_samples(shards, tmp_path):
    urls = [f"pipe:cat {path}" for path in shards]
    options = StreamOptions(virtual_streams=4, window=4, index_cache=str(tmp_path / "cache"))
    keys = [key for batch in batches(urls, options=options) for key in batch]
    assert len(set(keys)) == len(keys) == 112
    assert in_global_order(urls, 2, 2, options=options) == batches(urls, options=options)


# --- faults --------------------------------------------------------------------------------------


def test_a_bad_sample_gives_its_place_to_the_next_and_no_other_moves(shards):
    bad = {"s2-0005", "s2-0006", "s4-0030", "s0-0000"}

    def decode(raw):
        if raw["__key__"] in bad:
            raise BadSampleError("video_unreadable")
        return raw["__key__"]

    clean = [key for batch in batches(shards) for key in batch]
    loader, faults = stream(shards, decode=decode)
    skipped = [key for batch in loader for key in batch]
    moved = [i for i, (a, b) in enumerate(zip(clean, skipped, strict=True)) if a != b]
    assert {clean[i] for i in moved} == bad & set(clean)
    assert faults.counts == {"video_unreadable": len(bad & set(clean))}
    assert bad.isdisjoint(skipped)
    assert in_global_order(shards, 2, 2, decode=decode) == [
        skipped[i : i + 2] for i in range(0, len(skipped), 2)
    ]


def test_raise_names_shard_key_and_reason(shards):
    def decode(raw):
        raise BadSampleError("video_empty", "0 bytes")

    manifest = read_manifest(str(shards[0]))
    order = FileOrder(manifest, 2)
    loader = StreamLoader(
        lambda e: EpochStream(manifest, order, decode, list, 30.0),
        order,
        Faults("raise"),
        num_workers=1,
    )
    with pytest.raises(BadSampleError) as caught:
        list(loader)
    assert str(caught.value) == f"{shards[0]} [s0-0000]: video_empty: 0 bytes"
    assert caught.value.reason == "video_empty"


def test_a_stream_without_one_good_sample_stops(shards):
    def decode(raw):
        raise BadSampleError("video_empty")

    with pytest.raises(BadSampleError, match="no_good_sample"):
        batches(shards, decode=decode)


def cut_in_payload(data: bytes) -> bytes:
    return data[: 3 * 1024 + 512 + 10]


def cut_at_header(data: bytes) -> bytes:
    return data[: 3 * 1024]


def cut_in_header(data: bytes) -> bytes:
    return data[: 3 * 1024 + 100]


def bad_checksum(data: bytes) -> bytes:
    return data[: 2 * 1024] + b"X" + data[2 * 1024 + 1 :]


def zeroed(data: bytes) -> bytes:
    return data[: 2 * 1024] + bytes(1024) + data[3 * 1024 :]


# members are one header and one block: 1024 bytes; a sample is two of them
BROKEN = [
    (cut_in_payload, "tar_truncated", 1),
    (cut_at_header, "tar_truncated", 2),  # the second sample has lost its mp4
    (cut_in_header, "tar_truncated", 2),
    (bad_checksum, "tar_corrupt", 18),  # the lost part and the remaining half both have a place
    (zeroed, "tar_corrupt", 18),
    (lambda data: b"", "tar_empty", 0),
    (lambda data: bytes(10_240), "tar_empty", 0),
    (lambda data: b"no tar at all" * 99, "not_a_tar", 0),
    (lambda data: gzip.compress(data), "not_a_tar", 0),
    (None, "shard_missing", 0),
]


@pytest.mark.parametrize(("break_it", "reason", "left"), BROKEN)
def test_a_broken_shard_is_no_silent_short_one(shards, break_it, reason, left):
    if break_it is None:
        shards[3].unlink()
    else:
        shards[3].write_bytes(break_it(shards[3].read_bytes()))
    manifest = read_manifest([str(path) for path in shards])
    assert [(fault.shard, fault.reason) for fault in manifest.faults] == [(str(shards[3]), reason)]
    assert manifest.shards[3].count == left
    assert not index_path(shards[3]).exists()
    assert [shard.count for shard in manifest.shards if shard.url != str(shards[3])] == [
        23, 1, 40, 31,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (cut_in_payload, "tar_truncated"),
        (cut_at_header, "tar_truncated"),
        (lambda data: b"", "tar_truncated"),
        (None, "shard_missing"),
    ],
)
def test_a_shard_broken_after_indexing_keeps_the_order_of_the_rest(shards, break_it, reason):
    clean = [key for batch in batches(shards) for key in batch]
    if break_it is None:
        shards[3].unlink()
    else:
        shards[3].write_bytes(break_it(shards[3].read_bytes()))
    loader, faults = stream(shards)
    survived = [key for batch in loader for key in batch]
    lost = [a for a, b in zip(clean, survived, strict=True) if a != b]
    assert lost
    assert {key[:2] for key in lost} == {"s3"}
    assert faults.counts == {reason: len(lost)}
