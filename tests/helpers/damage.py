"""Damages shards at random. Each kind returns a shard and the keys of possibly damaged samples.

`KINDS` holds every kind by name.
"""

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise

import av

from datamodules.shards.synthetic import draw_frames, make_sample
from datamodules.stream.reading.tar import sample_offsets, untar_sample
from tests.helpers.tiny_shards import sample_tar

Members = dict[str, bytes]
Damaged = tuple[bytes, set[str]]
EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


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
    """Returns one sample of every kind, by key. No key is part of another key or of any content."""
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


def runs(data: bytes) -> dict[str, bytes]:
    """Returns the bytes (headers and contents) of each sample, by key."""
    offsets, fault = sample_offsets(io.BytesIO(data))
    assert fault is None
    found = [data[start:end] for start, end in pairwise(offsets)]
    return {untar_sample(run, "")["__key__"]: run for run in found}


def untouched(data: bytes, original: bytes) -> set[str]:
    """Returns the keys of samples that are unchanged and have no further member with their key."""
    return {
        key
        for key, run in runs(original).items()
        if run in data and data.count(key.encode()) == run.count(key.encode())
    }


def a_shard(rng: random.Random) -> bytes:
    content = samples()
    chosen = rng.sample(sorted(content), 8)
    form = rng.choice([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
    return sample_tar([(key, content[key]) for key in sorted(chosen)], form)


def flips(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 40])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    end = rng.randrange(len(data) + 1)
    return data[: end // 512 * 512] if rng.random() < 0.5 else data[:end]


def lost(rng: random.Random, data: bytes) -> bytes:
    """Removes less than 512 bytes. The loss of whole members could not be detected."""
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
    """Changes a field of a header, and makes the checksum match.

    The samples that the new header covers and their neighbours may change. All others must stay.
    """
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
    """Swaps or repeats members."""
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
    """Makes a correct shard, except for the content of one member."""
    content = dict(samples())
    places = [
        (k, s) for k, members in content.items() for s in members if s.endswith(tuple(suffixes))
    ]
    key, suffix = rng.choice(places)
    content[key] = {**content[key], suffix: change(rng, content[key][suffix])}
    return sample_tar(content.items(), tarfile.GNU_FORMAT), {key}


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
    """Changes sizes, names, places or values of an MP4's boxes."""
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
        else:  # changes any number in the box, most often in a table
            at = rng.randrange(start + 8, max(end - 3, start + 9))
            at = min(start + (at - start) // 4 * 4, len(changed) - 4)
            struct.pack_into(">I", changed, at, rng.choice(EXTREMES))
    return bytes(changed)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Replaces the value at a random place."""
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
