"""The stream's indexes, reading by range, and every way a shard can be broken."""

import contextlib
import gzip
import io
import os
import struct
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from datamodules.batch import BadSampleError
from datamodules.index import expand_urls, index_path, read_manifest
from datamodules.order import FileOrder, ShuffledOrder, StreamOptions
from datamodules.source import HttpFile, LocalFile, PipeFile
from datamodules.stream import EpochStream, Faults, ShardReader, StreamLoader
from datamodules.tar import untar_sample

OPTIONS = StreamOptions(seed=3, virtual_streams=12, window=5, chunk=3)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(shard: int, count: int) -> list[tuple[str, bytes]]:
    keys = [f"s{shard}-{n:04d}" for n in range(count)]
    return [(f"{key}.{suffix}", f"{key} {suffix}".encode() * 9) for key in keys for suffix in
            ("json", "mp4")]  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    counts = [23, 1, 40, 17, 31]  # 112 samples
    return [write_tar(tmp_path / f"{n}.tar", sample_members(n, c)) for n, c in enumerate(counts)]


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
    """(loader, faults) over raw shards; a batch is the list of its keys."""
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


def test_index_has_the_layout_of_energon(tmp_path):
    """First header of each sample, then the end of the last; folders and metadata are no sample."""
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
    """Every sample read by range is the one that a plain pass over the tar gives."""
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
    (cut_at_header, "tar_truncated", 2),  # the second has lost its mp4
    (cut_in_header, "tar_truncated", 2),
    (bad_checksum, "tar_corrupt", 18),  # what is lost, and the half that is left, have a place
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


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("/etc/a.json", b"{}")], "unsafe_member"),
        ([("x/../../a.json", b"{}")], "unsafe_member"),
        ([("a.json", b"{}"), ("a.json", b"{}")], "duplicate_member"),
    ],
)
def test_unsafe_members_are_refused(tmp_path, members, reason):
    data = write_tar(tmp_path / "a.tar", members).read_bytes()
    end = 1024 * len(members)
    with pytest.raises(BadSampleError) as caught:
        untar_sample(data[:end], "u")
    assert caught.value.reason == reason


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
    raw = untar_sample(reader.read(0, 0), "u")
    reader.close()
    assert set(raw) == {"__key__", "__url__", "json"}


def read_good(path):
    """The samples that can still be read, by key; each other one must say what is wrong."""
    manifest = read_manifest(str(path))
    reader, good = ShardReader(manifest, 30.0), {}
    for i in range(manifest.shards[0].count):
        with contextlib.suppress(BadSampleError):
            sample = untar_sample(reader.read(0, i), "u")
            good[sample["__key__"]] = sample
    reader.close()
    return good, manifest.faults


def test_random_damage_never_crashes_or_hangs(shards):
    """And a shard that is only cut keeps every sample before the cut as it was."""
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
            # A cut between two members looks like the end: decoding tells what the last one lacks.
            assert last[1].items() <= all_good.get(last[0], {}).items()


# --- remote --------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves a folder: `/ranges/x`, `/plain/x` without ranges, `/cut/x`, `/stall/x`, `/flaky/x`."""

    def do_GET(self):
        _, how, name = self.path.split("/", 2)
        path = self.server.folder / name  # pyright: ignore
        self.server.requests[how] += 1  # pyright: ignore
        if not path.exists():
            return self.send_error(404)
        if how == "flaky" and self.server.requests[how] % 2:  # pyright: ignore
            return self.send_error(503)
        data, status = path.read_bytes(), 200
        if (wanted := self.headers.get("Range")) and how != "plain":
            start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            data, status = data[start : end + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if how in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if how == "stall":
                self.server.let_go.wait(20)  # pyright: ignore
            return None
        self.wfile.write(data)
        return None

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests = shards[0].parent, Counter()  # pyright: ignore
    server.let_go = threading.Event()  # pyright: ignore
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"  # pyright: ignore
    yield server
    server.let_go.set()  # pyright: ignore
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("how", ["ranges", "plain", "flaky"])
def test_http_gives_what_files_give(shards, server, tmp_path, how):
    data = shards[0].read_bytes()
    source = HttpFile(f"{server.url}/{how}/0.tar", timeout_s=5.0)
    for start, end in ((0, 512), (1024, 5000), (512, 1024)):
        assert source.read(start, end) == data[start:end]
    source.close()
    if how != "flaky":
        manifest = read_manifest(f"{server.url}/{how}/{{0..4}}.tar", cache=tmp_path / "cache")
        assert len(manifest) == 112
        assert not manifest.faults
        requests = server.requests[how]
        again = read_manifest(f"{server.url}/{how}/{{0..4}}.tar", cache=tmp_path / "cache")
        assert again == manifest
        assert server.requests[how] == requests  # the index is kept


@pytest.mark.parametrize(
    ("how", "reason"),
    [("cut", "shard_cut"), ("stall", "shard_stalled"), ("ranges", "shard_missing")],
)
def test_http_faults(server, tmp_path, how, reason):
    name = "absent.tar" if reason == "shard_missing" else "0.tar"
    began = time.monotonic()
    url = f"{server.url}/{how}/{name}"
    source = HttpFile(url, timeout_s=0.2)
    with pytest.raises(BadSampleError) as caught:
        source.read(0, 2048)
    source.close()
    assert caught.value.reason == reason
    manifest = read_manifest(url, timeout_s=0.2, cache=tmp_path / "cache")
    assert [fault.reason for fault in manifest.faults] == [reason]
    assert time.monotonic() - began < 10


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(BadSampleError, match="shard_unreadable"):
        HttpFile("http://127.0.0.1:9/a.tar", timeout_s=0.5).read(0, 10)


def test_pipe_faults(shards):
    for command, reason in (
        (f"cat {shards[0]}; exit 3", "shard_unreadable"),
        ("sleep 30", "shard_stalled"),
        (f"head -c 2000 {shards[0]}", "tar_truncated"),
    ):
        pipe = PipeFile(command, timeout_s=0.3)
        with pytest.raises(BadSampleError) as caught:
            pipe.read(0, shards[0].stat().st_size + 10)
        pipe.close()
        assert caught.value.reason == reason


def test_a_pipe_goes_back_by_starting_again(shards):
    pipe, file = PipeFile(f"cat {shards[0]}", timeout_s=5.0), LocalFile(str(shards[0]))
    for start, end in ((0, 100), (5000, 9000), (200, 300)):
        assert pipe.read(start, end) == file.read(start, end)
    pipe.close()
    file.close()
