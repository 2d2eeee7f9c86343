"""Damaged shards by the thousand: no crash, no hang, no good sample lost or altered.

FUZZ_CASES says how many (`make fuzz`), FUZZ_SEED with which one to begin: each case depends on its
seed alone, so that FUZZ_SEED=n FUZZ_CASES=1 is the n-th again. Cases run in forked processes, as a
decoder that is written in C can take its process along.
"""

import faulthandler
import io
import json
import os
import random
import resource
import signal
import struct
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import av
import pytest
import torch

from datamodules.batch import BadSampleError
from datamodules.conversation import ConversationEncoder
from datamodules.frames import MAX_BYTES, FrameReader, UniformSampler
from datamodules.index import read_manifest
from datamodules.instruct import Sample, decode_sample
from datamodules.source import ForwardFile
from datamodules.stream import ShardReader
from datamodules.synthetic import draw_frames, make_sample
from datamodules.tar import sample_offsets, untar_sample

CASES = int(os.environ.get("FUZZ_CASES", "200"))
FIRST = int(os.environ.get("FUZZ_SEED", "0"))
HANG_S = 60

Members = dict[str, bytes]
EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


# --- what is damaged -----------------------------------------------------------------------------


def encode(container: str, codec: str, pixels: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for picture in draw_frames(5, 6)[0]:
            out.mux(stream.encode(av.VideoFrame.from_image(picture).reformat(format=pixels)))
        out.mux(stream.encode())
    return file.getvalue()


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    draw_frames(6, 1)[0][0].save(file, kind)
    return file.getvalue()


@cache
def samples() -> dict[str, Members]:
    """One of every kind, by key. No key is part of another, or of any content."""
    made = {f"key-{n:02d}": make_sample(n, num_frames=6) for n in range(4)}
    videos = {
        "mkv": encode("matroska", "libx264", "yuv420p"),
        "ts": encode("mpegts", "mpeg2video", "yuv420p"),
        "avi": encode("avi", "mjpeg", "yuvj420p"),
        "gif": encode("gif", "gif", "rgb8"),
        "mov": encode("mov", "png", "rgb24"),
    }
    for suffix, data in videos.items():
        made[f"key-{len(made):02d}"] = {suffix: data, "json": made["key-00"]["json"]}
    talk = json.loads(made["key-01"]["json"])
    pictures = {"0.png": picture("PNG"), "1.webp": picture("WEBP")}
    made[f"key-{len(made):02d}"] = {**pictures, "json": json.dumps(talk).encode()}
    return made


@cache
def decoder() -> Callable[[dict], Sample]:
    read = FrameReader(16, UniformSampler(2))
    return partial(decode_sample, frames=read, conversation=ConversationEncoder(max_length=256))


def pack(content: dict[str, Members], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for key, members in content.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def runs(data: bytes) -> dict[str, bytes]:
    """Headers and payloads of each sample, by key."""
    offsets, fault = sample_offsets(io.BytesIO(data))
    assert fault is None
    found = [data[start:end] for start, end in pairwise(offsets)]
    return {untar_sample(run, "")["__key__"]: run for run in found}


# --- damage: random numbers -> a shard, and the keys of samples that it may have touched ---------

Damaged = tuple[bytes, set[str]]


def untouched(data: bytes, original: bytes) -> set[str]:
    """Samples that stand there as they were, once, and with no other member of their key."""
    return {
        key
        for key, run in runs(original).items()
        if run in data and data.count(key.encode()) == run.count(key.encode())
    }


def a_shard(rng: random.Random) -> bytes:
    content = samples()
    chosen = rng.sample(sorted(content), 8)
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
    return pack({key: content[key] for key in sorted(chosen)}, form)


def flips(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 40])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    end = rng.randrange(len(data) + 1)
    return data[: end // 512 * 512] if rng.random() < 0.5 else data[:end]


def lost(rng: random.Random, data: bytes) -> bytes:
    """A piece is missing, of a length that is seen (of whole members it cannot be)."""
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 512) :]


def overwritten(rng: random.Random, data: bytes) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice([1, 100, 512, 1024, 9000])
    filler = rng.choice([bytes(size), rng.randbytes(size), b"\xff" * size])
    return data[:start] + filler + data[start + size :]


def inserted(rng: random.Random, data: bytes) -> bytes:
    start, size = rng.randrange(len(data)), rng.choice([1, 100, 511, 512, 1024, 9000])
    if rng.random() < 0.5:
        start = start // 512 * 512
    other = rng.randrange(len(data))
    return (
        data[:start] + rng.choice([rng.randbytes(size), data[other : other + size]]) + data[start:]
    )


DAMAGE = (flips, cut, lost, overwritten, inserted)


def damage_bytes(rng: random.Random) -> Damaged:
    original = a_shard(rng)
    data = rng.choice(DAMAGE)(rng, original)
    return data, set(samples()) - untouched(data, original)


def damage_header(rng: random.Random) -> Damaged:
    """A field of a header says something else, and the checksum agrees. What such a header covers,
    and its neighbours, are as the archive now says: only the others have to be as before."""
    original = a_shard(rng)
    with tarfile.open(fileobj=io.BytesIO(original)) as tar:
        member = rng.choice(tar.getmembers())
    at = member.offset_data - 512
    header = bytearray(original[at : at + 512])
    start, size = rng.choice(
        [(0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
    )
    number = rng.choice([*EXTREMES, 2**33 - 1])
    fields = [
        b"%o" % number,
        rng.randbytes(size),
        b"\xff" * size,
        b"\x80" + rng.randbytes(size - 1),
    ]
    fields += [bytes(size), b"../x.json", b"/x.json", rng.choice("SLKxgX012345").encode()]
    field = rng.choice(fields)
    header[start : start + size] = field[:size].ljust(size, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    data = original[:at] + bytes(header) + original[at + 512 :]
    try:
        claimed = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        claimed = 0
    places = [(original.find(run), key) for key, run in runs(original).items()]
    before = max((place for place in places if place[0] <= at), default=places[0])
    near = places.index(before)
    exempt = {key for _, key in places[max(near - 1, 0) : near + 2]}
    exempt |= {key for place, key in places if at <= place < at + 1024 + claimed}
    return data, exempt | (set(samples()) - {key for _, key in places})


def damage_order(rng: random.Random) -> Damaged:
    """Members change places, or come twice."""
    original = a_shard(rng)
    with tarfile.open(fileobj=io.BytesIO(original)) as tar:
        members, ends = tar.getmembers(), [0]
        for member in members:
            ends.append(member.offset_data + -(-member.size // 512) * 512)
    pieces = [original[a:b] for a, b in pairwise(ends)]
    for _ in range(rng.randrange(1, 4)):
        a, b = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        if rng.random() < 0.7:
            pieces[a], pieces[b] = pieces[b], pieces[a]
        else:
            pieces.insert(a, pieces[b])
    data = b"".join(pieces) + bytes(1024)
    return data, set(samples()) - untouched(data, original)


def damage_member(rng: random.Random, suffixes: Sequence[str], change: Callable) -> Damaged:
    """A shard as it should be, but for the content of one member."""
    content = dict(samples())
    places = [
        (k, s) for k, members in content.items() for s in members if s.endswith(tuple(suffixes))
    ]
    key, suffix = rng.choice(places)
    content[key] = {**content[key], suffix: change(rng, content[key][suffix])}
    return pack(content), {key}


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 2])):
        data = rng.choice(DAMAGE)(rng, data or b"\0")
    return data


def boxes(data: bytes, start: int, end: int) -> list[tuple[int, int]]:
    found = []
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        if not 8 <= size <= end - start:
            break
        found.append((start, start + size))
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"udta"):
            found += boxes(data, start + 8, start + size)
        start += size
    return found


def change_boxes(rng: random.Random, data: bytes) -> bytes:
    """Numbers, names and places of an mp4's boxes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        every = boxes(bytes(changed), 0, len(changed))
        if not every:
            break
        (start, end), (other, other_end) = rng.choice(every), rng.choice(every)
        what = rng.randrange(5)
        if what == 0:
            struct.pack_into(">I", changed, start, rng.choice(EXTREMES))
        elif what == 1:
            changed[start + 4 : start + 8] = changed[other + 4 : other + 8]
        elif what == 2:
            del changed[start:end]
        elif what == 3:
            changed[end:end] = changed[other:other_end]
        else:  # any number in it, most often of a table
            at = rng.randrange(start + 8, max(end - 3, start + 9))
            at = min(start + (at - start) // 4 * 4, len(changed) - 4)
            struct.pack_into(">I", changed, at, rng.choice(EXTREMES))
    return bytes(changed)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Another value in any place."""
    entry = json.loads(data)
    odd = [None, True, -1, 1e308, float("nan"), 10**400, [], {}, [[]] * 99, {"from": "gpt"}]
    odd += ["", "\ud800", "<video>", "<image>\n" * 9, "\0", "x" * 100_000, "\ue000", "system"]
    node, nodes = entry, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        nodes.append((node, key))
        node = node[key]
    node, key = rng.choice(nodes)
    node[key] = rng.choice(odd)
    if rng.random() < 0.2 and isinstance(node, list):
        node *= rng.choice([0, 2, 300])
    return json.dumps(entry).encode()


VISUALS = ("mp4", "mkv", "ts", "avi", "gif", "mov", "jpg", "png", "webp")
KINDS: dict[str, Callable[[random.Random], Damaged]] = {
    "bytes of a shard": damage_bytes,
    "a header": damage_header,
    "order of members": damage_order,
    "bytes of a visual": partial(damage_member, suffixes=VISUALS, change=change_bytes),
    "boxes of a video": partial(damage_member, suffixes=("mp4", "mov"), change=change_boxes),
    "bytes of a JSON": partial(damage_member, suffixes=("json",), change=change_bytes),
    "values of a JSON": partial(damage_member, suffixes=("json",), change=change_json),
}


# --- what must hold ------------------------------------------------------------------------------


def equal(one: Sample, other: Sample) -> bool:
    return one.text == other.text and all(map(torch.equal, one.visuals, other.visuals))


def run_case(seed: int, folder: Path) -> tuple[str, str]:
    """(kind of damage, what is wrong with the way it was taken or nothing)."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    data, touched = KINDS[kind](rng)
    path = folder / f"{seed}.tar"
    path.write_bytes(data)
    manifest = read_manifest(str(path))
    reader, good, reasons = ShardReader(manifest, 5.0), {}, Counter()
    for number in range(manifest.shards[0].count):
        try:
            raw = untar_sample(reader.read(0, number), "u")
            key = raw["__key__"]
            same = {s: d for s, d in raw.items() if s[:2] != "__"} == samples().get(key)
            if same and key in good:
                continue
            if not same or rng.random() < 0.2:  # the same bytes give the same sample
                sample = decoder()(raw)
                if same and not equal(sample, decoder()({**raw, **samples()[key]})):
                    return kind, f"{key} is decoded in two ways"
            if same:
                good[key] = raw
        except BadSampleError as error:
            reasons[error.reason] += 1
    reader.close()
    if missing := set(samples()) - touched - set(good):
        return kind, f"lost {sorted(missing)}: {manifest.faults}, {dict(reasons)}"
    sample_offsets(ForwardFile(iter([data])))  # as a pipe is read
    path.unlink()
    path.with_name(path.name + ".idx").unlink(missing_ok=True)
    return kind, ""


def child(seeds: Sequence[int], folder: Path, results: int) -> None:
    """Writes a line before a case and one behind it. SIGALRM ends the process, wherever it is."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.disable()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        signal.alarm(HANG_S)
        os.write(results, f"start {seed}\n".encode())
        try:
            kind, wrong = run_case(seed, folder)
        except BaseException:
            kind, wrong = "?", " | ".join(traceback.format_exc().splitlines()[-5:])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > 1.25 * MAX_BYTES and not wrong:
            wrong = f"{grown} bytes of memory"
            before += grown >> 10
        os.write(results, f"end {seed} {kind}: {wrong}\n".encode())


def run_seeds(seeds: list[int], folder: Path) -> tuple[list[str], Counter]:
    """Failures, and the number of cases by kind. A process that dies costs its own case."""
    failures, kinds = [], Counter()
    while seeds:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                child(seeds, folder, write)
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as lines:
            at = None
            for line in lines:
                word, rest = line.rstrip("\n").split(" ", 1)
                at = int(rest) if word == "start" else None
                if word == "end":
                    head, _, wrong = rest.partition(": ")
                    seed, _, kind = head.partition(" ")
                    kinds[kind] += 1
                    failures += [f"{seed} ({kind}): {wrong}"] if wrong else []
        _, status = os.waitpid(pid, 0)
        if at is None:
            break
        died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "left"
        failures.append(f"{at}: the process ended with {died}")
        seeds = seeds[seeds.index(at) + 1 :]
    return failures, kinds


@pytest.mark.timeout(24 * 3600 if CASES > 1000 else 300)
def test_no_damage_costs_more_than_it_touches(tmp_path):
    samples(), decoder()  # made before the fork
    seeds = list(range(FIRST, FIRST + CASES))
    failures, kinds = run_seeds(seeds, tmp_path)
    print(f"\n{sum(kinds.values())} damaged shards: {dict(kinds)}")
    again = "\nReplay one: FUZZ_SEED=<number> FUZZ_CASES=1 make fuzz"
    assert not failures, f"{len(failures)} of {CASES} cases:\n" + "\n".join(failures[:40]) + again
    assert sum(kinds.values()) == CASES


def test_a_decoder_that_crashes_or_hangs_is_seen(tmp_path, monkeypatch):
    """What the fuzz would say of them: the guard is itself guarded."""

    def broken(seed: int, folder: Path) -> tuple[str, str]:
        if seed == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        while seed == 2:
            pass
        return "none", "wrong" if seed == 3 else ""

    monkeypatch.setitem(globals(), "run_case", broken)
    monkeypatch.setitem(globals(), "HANG_S", 1)
    failures, kinds = run_seeds([0, 1, 2, 3, 4], tmp_path)
    assert failures == [
        "1: the process ended with SIGSEGV",
        "2: the process ended with SIGALRM",
        "3 (none): wrong",
    ]
    assert kinds == {"none": 3}
