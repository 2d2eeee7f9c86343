"""A folder of videos and images with LLaVA annotations <-> shards.

One shard is one task of one process. Its samples and bytes depend on the annotations alone, not
on the number of processes; it appears whole, with its index, or not at all.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import av
from av import VideoFrame
from webdataset import TarWriter  # pyright: ignore[reportAttributeAccessIssue]

from datamodules.batch import BadSampleError
from datamodules.conversation import VISUALS, is_video, match_slots, parse_sample, read_turns
from datamodules.frames import (
    FrameReader,
    UniformSampler,
    check_image,
    count_frames,
    open_video,
    upright,
)
from datamodules.index import Shard, index_path, index_shard, lengths_path, write_index
from datamodules.source import open_source
from datamodules.tar import untar_sample


class BadItem(NamedTuple):
    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class Outcome:
    """What became of the samples of some shards."""

    good: int = 0
    bad: list[BadItem] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.good += other.good
        self.bad += other.bad


def read_annotations(path: Path) -> list[Any]:
    """Entries of a JSON list, or of a file with one JSON object a line.

    Raises:
        ValueError: unreadable; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"annotations {str(path)!r} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        entries = _parse(text, str(path))
        if not isinstance(entries, list):
            raise ValueError(f"{path}: a list of entries is expected, one object a line in .jsonl")
        return entries
    lines = enumerate(text.splitlines(), start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, absurd numbers, absurd nesting
        raise ValueError(f"{where}: {error}") from None


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """(key, members by suffix) -> tar and index, whole or not at all. Empty: nothing is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        count = 0
        with open(temporary, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                for key, members in samples:
                    tar.write({"__key__": key, **members})
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        if count:
            offsets, fault = index_shard(str(temporary))
            assert fault is None, fault
            for older in (index_path(path), lengths_path(index_path(path))):
                older.unlink(missing_ok=True)  # of another shard in this place
            os.replace(temporary, path)
            write_index(offsets, [index_path(path)])
    finally:
        temporary.unlink(missing_ok=True)


class PackTask(NamedTuple):
    """One shard to write; `first` is the number of its first entry."""

    path: Path
    first: int
    entries: Sequence[Any]


def plan_shards(entries: Sequence[Any], output: Path, shard_size: int) -> list[PackTask]:
    return [
        PackTask(output / f"shard-{n:06d}.tar", first, entries[first : first + shard_size])
        for n, first in enumerate(range(0, len(entries), shard_size))
    ]


def pack_shard(task: PackTask, videos: Path, short_side: int | None) -> Outcome:
    """Writes one shard of the entries that are good."""
    outcome = Outcome()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, entry in enumerate(task.entries, start=task.first):
            try:
                members = _members(entry, videos, short_side)
            except BadSampleError as error:
                key = f"entry {number}"
                if isinstance(entry, dict) and "id" in entry:
                    key += f" ({entry['id']})"
                outcome.bad.append(BadItem(task.path.name, key, error.reason, error.detail))
            else:
                outcome.good += 1
                yield f"{number:09d}", members

    write_shard(task.path, samples())
    return outcome


def _members(entry: Any, videos: Path, short_side: int | None) -> dict[str, bytes]:
    turns = read_turns(entry)
    names = [*_names(entry, "image"), *_names(entry, "video")]
    match_slots(turns, names)
    members = {}
    for number, name in enumerate(names):
        data = _read_visual(videos, name)
        if is_video(name) and short_side is not None:
            data, name = reencode(data, short_side), "x.mp4"
        elif is_video(name):
            FrameReader(1, UniformSampler(1)).video(data)  # as verify would refuse it
        else:
            check_image(data)
        suffix = name.rpartition(".")[2].lower()
        members[suffix if len(names) == 1 else f"{number}.{suffix}"] = data
    try:
        text = json.dumps(entry, ensure_ascii=False, sort_keys=True).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadSampleError("bad_field", str(error)) from None
    return {**members, "json": text}


def _names(entry: dict, field_name: str) -> list[str]:
    value = entry.get(field_name) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSampleError("bad_field", f"{field_name}: a file name or a list of them")
    for name in names:
        if name.rpartition(".")[2].lower() not in VISUALS:
            raise BadSampleError("unknown_format", name)
    return names


def _read_visual(videos: Path, name: str) -> bytes:
    try:
        path = (videos / name).resolve()
        if not path.is_relative_to(videos.resolve()):
            raise BadSampleError("unsafe_path", f"{name} is outside {videos}")
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            raise BadSampleError("file_unreadable", f"{name}: no file")
        return path.read_bytes()
    except FileNotFoundError:
        raise BadSampleError("file_missing", name) from None
    except (OSError, ValueError) as error:  # a name with a zero byte
        text = getattr(error, "strerror", None) or str(error)
        raise BadSampleError("file_unreadable", f"{name}: {text}") from None


def reencode(data: bytes, short_side: int, gop: int = 8) -> bytes:
    """H.264 that is cheap to read at random: small, keyframes close by, none that looks ahead.

    Raises:
        BadSampleError: as `count_frames`.
    """
    count_frames(data)
    options = {"movflags": "faststart"}  # needs a file that can be opened twice
    with (
        NamedTemporaryFile(suffix=".mp4") as file,
        open_video(data) as source,
        av.open(file.name, "w", format="mp4", options=options) as target,
    ):
        video = source.streams.video[0]
        stream = target.add_stream("libx264", rate=video.average_rate or 25)
        stream.options = {"g": str(gop), "bf": "0", "threads": "1", "crf": "20"}
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = video.time_base or Fraction(1, 90_000)
        started = False
        for frame in source.decode(video):
            if frame.rotation:
                pts, base = frame.pts, frame.time_base
                frame = VideoFrame.from_ndarray(upright(frame.to_ndarray(format="rgb24"), frame))
                frame.pts, frame.time_base = pts, base
            if not started:
                stream.width, stream.height = _even_size(frame, short_side)
                started = True
            small = frame.reformat(stream.width, stream.height, "yuv420p", interpolation="AREA")
            target.mux(stream.encode(small))
        target.mux(stream.encode())
        target.close()
        return Path(file.name).read_bytes()


def _even_size(frame: VideoFrame, short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(frame.width, frame.height))
    width, height = (max(2, round(n * scale / 2) * 2) for n in (frame.width, frame.height))
    return width, height


def verify_shard(url: str, timeout_s: float = 30.0) -> Outcome:
    """Reads every sample of a shard fully: headers, JSON, every frame.

    The shard's index is not trusted but made again; one that is kept and differs is an item too.
    """
    outcome = Outcome()
    offsets, fault = index_shard(url, timeout_s)
    if fault is not None:
        outcome.bad.append(BadItem(url, "", fault.reason, fault.detail))
    elif index_path(url).is_file():
        kept = Shard(url, 0, index_path(url)).read_offsets()
        if list(kept) != offsets:
            outcome.bad.append(BadItem(url, "", "index_stale", str(index_path(url))))
    if len(offsets) < 2:
        return outcome
    source = open_source(url, timeout_s)
    try:
        for number, (start, end) in enumerate(pairwise(offsets)):
            outcome.add(_verify_sample(url, number, partial(source.read, start, end)))
    finally:
        source.close()
    return outcome


def _verify_sample(url: str, number: int, read: Callable[[], bytes]) -> Outcome:
    key = f"#{number}"
    try:
        raw = untar_sample(read(), url)
        key = raw["__key__"]
        _, suffixes = parse_sample(raw)
        for suffix in suffixes:
            if is_video(suffix):
                count_frames(raw[suffix])
            else:
                check_image(raw[suffix])
    except BadSampleError as error:
        return Outcome(bad=[BadItem(url, key, error.reason, error.detail)])
    return Outcome(good=1)
