"""Benchmarks the stream against plain webdataset and bare decoding, and resuming against starting.

All ways decode the same clips with the same function. They take turns batch by batch in one
process, so that its CPU time is the whole cost and other load matters little. With workers, wall
time is measured instead. The large set has little to decode and much to skip.
"""

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path

import torch
import webdataset as wds
from harness import Row, at_most, table
from torch.utils.data import DataLoader

from datamodules.batch import VideoBatch
from datamodules.instruct import collate, decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import draw_frames, encode_video, make_sample
from datamodules.stream.index import index_path, index_shard, read_manifest
from datamodules.stream.loader import EpochStream, Faults, StreamLoader
from datamodules.stream.order import ShuffledOrder, StreamOptions
from datamodules.visuals.frames import FrameReader, UniformSampler

BATCH, FRAMES, SIDE, IMAGE = 4, 48, 320, 112
OPTIONS = StreamOptions(virtual_streams=1)


@dataclass(frozen=True)
class Scale:
    """The amount of data. `python benchmarks/stream.py 20 5` sets the first two fields."""

    gigabytes: float = 1.0
    repeats: int = 5
    clips: int = 12
    samples: int = 96
    shards: int = 4


def run(scale: Scale = Scale()) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_clips(small, scale)
        write_large(large, scale)
        return [*throughput(small, scale), *first_batches(large, scale), index_time(large, scale)]


# --- data ----------------------------------------------------------------------------------------


def write_clips(folder: Path, scale: Scale) -> None:
    clips = [encode_video(draw_frames(n, FRAMES, SIDE)[0], gop=8) for n in range(scale.clips)]
    text = make_sample(0)["json"]
    each = scale.samples // scale.shards
    for shard in range(scale.shards):
        numbers = range(shard * each, (shard + 1) * each)
        samples = [(f"{n:06d}", {"mp4": clips[n % len(clips)], "json": text}) for n in numbers]
        write_shard(folder / f"{shard:04d}.tar", samples)


def write_large(folder: Path, scale: Scale, filler: int = 2 << 20, each: int = 32) -> None:
    """Writes shards whose samples have a small clip and 2 MiB of data that is never read."""
    members = {**make_sample(0), "bin": os.urandom(filler)}
    for shard in range(max(1, round(scale.gigabytes * 2**30 / filler / each))):
        numbers = range(shard * each, (shard + 1) * each)
        write_shard(folder / f"{shard:04d}.tar", [(f"{n:06d}", members) for n in numbers])


def decoders(image: int = IMAGE, frames: int = 8) -> tuple[Callable, Callable]:
    """Returns the functions that decode a sample and collate a batch, the same for all ways."""
    conversation = ConversationEncoder()
    read = FrameReader(image, UniformSampler(frames))
    return (
        partial(decode_sample, frames=read, conversation=conversation),
        partial(collate, pad_id=0, prompt_pad_id=0),
    )


def our_loader(patterns: str, decode: Callable, batch: Callable, **options) -> StreamLoader:
    manifest = read_manifest(patterns, cache=options.pop("cache", None))
    order = ShuffledOrder(manifest, BATCH, OPTIONS)
    return StreamLoader(
        lambda epoch: EpochStream(manifest, order.epoch(epoch), decode, batch, 30.0),
        order,
        Faults("raise"),
        **options,
    )


def plain_loader(folder: Path, decode: Callable, batch: Callable, workers: int) -> DataLoader:
    dataset = (
        wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100, seed=0)  # pyright: ignore
        .shuffle(OPTIONS.window)
        .map(decode)
        .batched(BATCH, collation_fn=batch)
    )
    return DataLoader(dataset, batch_size=None, num_workers=workers)


# --- samples per second --------------------------------------------------------------------------


def throughput(folder: Path, scale: Scale) -> list[Row]:
    decode, batch = decoders()
    paths = sorted(map(str, folder.glob("*.tar")))
    raw = [{**sample} for sample in wds.WebDataset(paths, shardshuffle=False)]  # pyright: ignore

    def ours(workers: int) -> Iterator[VideoBatch]:
        return iter(our_loader(str(folder), decode, batch, num_workers=workers))

    def plain(workers: int) -> Iterator[VideoBatch]:
        return iter(plain_loader(folder, decode, batch, workers))

    def bare() -> Iterator[VideoBatch]:
        for start in range(0, len(raw), BATCH):
            yield batch([decode(sample) for sample in raw[start : start + BATCH]])

    alone = side_by_side([partial(ours, 0), partial(plain, 0), bare], scale.repeats)
    shared = race([lambda: checksum(ours(2)), lambda: checksum(plain(2))], scale.repeats)
    return [
        rates("stream against webdataset", alone[0], alone[1], at_least=0.95),
        rates("stream against bare decoding", alone[0], alone[2], at_least=0.9),
        in_workers("stream against webdataset, two workers", *shared, len(raw), at_least=0.95),
    ]


def checksum(batches: Iterable[VideoBatch]) -> int:
    """Returns a checksum of all frames and labels that does not depend on their order."""
    return sum(
        int(batch.pixels.sum(dtype=torch.int64)) + int(batch.labels.sum()) for batch in batches
    )


@dataclass
class Passes:
    """Time and checksum of passes over the samples."""

    samples: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    result: int = 0


def side_by_side(ways: Sequence[Callable[[], Iterator]], repeats: int) -> list[Passes]:
    """Times the ways batch by batch in turn, so that other load disturbs all of them equally."""
    totals = [Passes() for _ in ways]
    for _ in range(repeats):
        running = [(way(), total) for way, total in zip(ways, totals, strict=True)]
        while running:
            for pair in running[:]:
                wall, cpu = time.perf_counter(), time.process_time()
                batch = next(pair[0], None)
                pair[1].cpu_s += time.process_time() - cpu
                pair[1].wall_s += time.perf_counter() - wall
                if batch is None:
                    running.remove(pair)
                else:
                    pair[1].samples += len(batch)
                    pair[1].result += checksum([batch])
    return totals


def race(ways: Sequence[Callable[[], int]], repeats: int) -> list[tuple[float, int]]:
    """Runs the ways in turn, first once unmeasured. Returns (best time, result) of each."""
    results = [way() for way in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return [(min(taken), result) for taken, result in zip(times, results, strict=True)]


def rates(name: str, ours: Passes, baseline: Passes, at_least: float) -> Row:
    """Returns a row of samples per second of CPU time, with those of wall time in brackets."""
    shown = (
        f"{p.samples / p.cpu_s:.1f} /s CPU ({p.samples / p.wall_s:.1f} /s)"
        for p in (ours, baseline)
    )
    gain = (ours.samples / ours.cpu_s) / (baseline.samples / baseline.cpu_s)
    same = (ours.samples, ours.result) == (baseline.samples, baseline.result)
    return _row(name, *shown, gain=gain, same=same, at_least=at_least)


def in_workers(
    name: str, ours: tuple[float, int], baseline: tuple[float, int], samples: int, at_least: float
) -> Row:
    shown = (f"{samples / taken:.1f} /s" for taken, _ in (ours, baseline))
    same = ours[1] == baseline[1]
    return _row(name, *shown, gain=baseline[0] / ours[0], same=same, at_least=at_least)


def _row(name: str, ours: str, baseline: str, gain: float, same: bool, at_least: float) -> Row:
    return Row(
        name,
        ours,
        baseline,
        gain=f"{gain:.2f} of its rate",
        difference="none" if same else "OTHER SAMPLES",
        target=f"at least {at_least:g} of it, equal",
        met=gain >= at_least and same,
    )


# --- the first batch -----------------------------------------------------------------------------


def first_batches(folder: Path, scale: Scale) -> list[Row]:
    """Times the first batch after reading a manifest, at 90 % of an epoch and at its start."""
    cache = folder / "cache"
    pairs = 3 * scale.repeats
    with range_server(folder) as (url, served):
        count = len(list(folder.glob("*.tar")))
        remote = f"{url}/{{0000..{count - 1:04d}}}.tar"
        read_manifest(remote, cache=cache)  # fills the cache of indexes
        rows, bytes_served = [], []
        for name, patterns in (("files", str(folder)), ("HTTP", remote)):
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(pairs):
                for share, taken in zip((0.9, 0.0), times, strict=True):
                    before = served()
                    taken.append(time_to_first(patterns, share, cache))
                    bytes_served.append(served() - before)
            best = [1000 * min(taken) for taken in times]
            row = f"first batch at 90 % of an epoch against 0 %, {name}, {scale.gigabytes:g} GiB"
            rows.append(at_most(row, *best, share=1.2, unit="ms"))
    asked = bytes_served[2 * pairs :]
    late, early = (statistics.mean(asked[part::2]) / 2**20 for part in (0, 1))
    return [*rows, at_most("first batch, bytes served", late, early, share=1.2, unit="MiB")]


def time_to_first(patterns: str, share: float, cache: Path) -> float:
    decode, batch = decoders(32, 4)
    start = time.perf_counter()
    loader = our_loader(patterns, decode, batch, cache=cache)
    loader = our_loader(
        patterns, decode, batch, cache=cache, position=lambda: (0, int(share * len(loader)))
    )
    batches = iter(loader)
    next(batches)
    taken = time.perf_counter() - start
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return taken


@contextmanager
def range_server(folder: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serves a folder from another process. Yields (url, function for the bytes served so far)."""
    context = get_context("fork")
    count = context.Value("q", 0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with open(folder / Path(self.path).name, "rb") as file:
                size = file.seek(0, io.SEEK_END)
                asked = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=")
                start, end = (int(n) for n in asked.split("-"))
                file.seek(start)
                data = file.read(end + 1 - start)
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            with count.get_lock():
                count.value += len(data)

        def log_message(self, format: str, *args) -> None:
            pass

    os.environ["NO_PROXY"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    process = context.Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", lambda: count.value
    finally:
        process.terminate()
        server.server_close()


# --- the index -----------------------------------------------------------------------------------


def index_time(folder: Path, scale: Scale) -> Row:
    """Times indexing files against one pass of webdataset over the same files."""
    paths = sorted(map(str, folder.glob("*.tar")))
    assert all(index_path(path).is_file() for path in paths)

    def index() -> int:
        return sum(len(index_shard(path)[0]) - 1 for path in paths)

    def read() -> int:
        return sum(1 for _ in wds.WebDataset(paths, shardshuffle=False))  # pyright: ignore

    ours, plain = race([index, read], 3)
    gigabytes = sum(os.path.getsize(path) for path in paths) / 1e9
    gain, same = plain[0] / ours[0], ours[1] == plain[1]
    return Row(
        "indexing of files",
        *(f"{taken / gigabytes:.3f} s/GB" for taken, _ in (ours, plain)),
        gain=f"{gain:.2f} x faster",
        difference="none" if same else "OTHER SAMPLES",
        target="at least 2 x, equal",
        met=gain >= 2 and same,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = dict(zip(("gigabytes", "repeats"), map(float, sys.argv[1:]), strict=False))
    print(table(run(Scale(**{**numbers, "repeats": int(numbers.get("repeats", 5))}))))
