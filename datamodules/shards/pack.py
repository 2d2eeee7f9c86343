"""Packs a folder of videos and images with LLaVA annotations into shards, and verifies shards.

One shard is one task of one process. Its samples and bytes depend only on the annotations, not on
the number of processes. A shard is an atomic write: it appears whole or not at all.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter  # pyright: ignore[reportAttributeAccessIssue]

from datamodules.common.atomic import whole
from datamodules.errors import BadSampleError
from datamodules.sample.conversation import match_slots, parse_entry, read_entry, read_turns
from datamodules.sample.question import read_task
from datamodules.shards.annotations.files import Annotation
from datamodules.shards.annotations.formats import to_conversation, with_answers
from datamodules.shards.annotations.media import Media, suffix_of
from datamodules.shards.annotations.spans import Span, take_span
from datamodules.shards.reencode import encode_frames, reencode
from datamodules.stream.index import Shard, index_path, index_shard, lengths_path, write_index
from datamodules.stream.reading.source import open_source
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FrameReader, UniformSampler, is_video, naming
from datamodules.visuals.images import open_image
from datamodules.visuals.videos import count_frames


class BadItem(NamedTuple):
    shard: str
    key: str
    reason: str
    detail: str


@dataclass
class Outcome:
    """The number of good samples of some shards, and the bad ones."""

    good: int = 0
    bad: list[BadItem] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.good += other.good
        self.bad += other.bad


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Writes samples (key, members by suffix) as a tar by an atomic write, and then its index.

    Writes nothing if there are no samples.

    Raises:
        OSError: the shard cannot be written; the error names it, also if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = iter(samples)
    if (first := next(rest, None)) is None:
        return
    with whole(path) as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for key, members in chain([first], rest):
                tar.write({"__key__": key, **members})
        file.flush()
        offsets, fault = index_shard(str(file.name))
        assert fault is None, fault
        for older in (index_path(path), lengths_path(index_path(path))):
            older.unlink(missing_ok=True)  # belongs to an older shard at this path
    write_index(offsets, [index_path(path)])


class PackTask(NamedTuple):
    """One shard to write; `first` is the number of its first entry."""

    path: Path
    first: int
    entries: Sequence[Annotation]


def plan_shards(entries: Sequence[Annotation], output: Path, shard_size: int) -> list[PackTask]:
    return [
        PackTask(output / f"shard-{n:06d}.tar", first, entries[first : first + shard_size])
        for n, first in enumerate(range(0, len(entries), shard_size))
    ]


def pack_shard(
    task: PackTask, media: Media, short_side: int | None, ignored: Collection[str] = ()
) -> Outcome:
    """Writes the good entries as one shard, and returns the outcome."""
    outcome = Outcome()

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, (where, entry, fault) in enumerate(task.entries, start=task.first):
            try:
                if fault is not None:
                    raise fault
                members = _members(entry, media, short_side, ignored)
            except BadSampleError as error:
                if isinstance(entry, dict) and "id" in entry:
                    where += f" ({entry['id']})"
                outcome.bad.append(BadItem(task.path.name, where, error.reason, error.detail))
            else:
                outcome.good += 1
                yield f"{number:09d}", members

    write_shard(task.path, samples())
    return outcome


def _members(
    published: Any, media: Media, short_side: int | None, ignored: Collection[str]
) -> dict[str, bytes]:
    entry = to_conversation(published, ignored)
    names = [name for word in ("image", "video") for name in _names(entry, word, media)]
    for answered in with_answers(entry):
        turns = read_turns(answered)
        match_slots(turns, names)
        read_task(answered, turns)
    entry, span, fields = take_span(entry, ignored)
    if span and short_side is None:
        what = f"{' and '.join(fields)}: only a part of {', '.join(names)} is asked for"
        raise BadSampleError(
            "part_of_video", f"{what}: cut it with --reencode, or add --ignore-field for each"
        )
    members = {}
    for number, name in enumerate(names):
        data, suffix = _read_visual(media, name, short_side, span)
        members[suffix if len(names) == 1 else f"{number}.{suffix}"] = data
    try:
        text = json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # an infinite number, a lone surrogate
        raise BadSampleError("bad_field", str(error)) from None
    return {**members, "json": text}


def _names(entry: dict, field_name: str, media: Media) -> list[str]:
    """Returns the file names of a field.

    A video name without a suffix means its .mp4 file, or a folder of frames.
    """
    value = entry.get(field_name) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSampleError(
            "bad_field", f"{field_name} must be a file name or a list of file names"
        )
    whole = []
    for name in names:
        bare = "." not in name.rpartition("/")[2]
        if field_name == "video" and not suffix_of(name):  # a name may have a dot, as in v1.2_a
            bare = bare or any(media.find(n) is not None for n in (f"{name}.mp4", f"{name}/."))
            name = f"{name.rstrip('/')}.mp4" if bare else name
        if not suffix_of(name):
            raise BadSampleError("unknown_format", name)
        whole.append(name)
    return whole


def _read_visual(
    media: Media, name: str, short_side: int | None, span: Span | None
) -> tuple[bytes, str]:
    """Returns the bytes for the shard and their suffix.

    Raises:
        BadSampleError: the visual cannot be used; the message names the file.
    """
    reading = [name]  # the file being read; in a folder, the current frame
    try:
        folder = name.removesuffix(f".{name.rpartition('.')[2]}")
        if is_video(name) and media.find(name) is None and (frames := media.frames(folder)):
            pictures = (media.read(reading[0]) for reading[0] in frames)
            return encode_frames(pictures, short_side, span), "mp4"
        data = media.read(name)
        if not is_video(name):
            open_image(data)
        elif short_side is not None:
            return reencode(data, short_side, span), "mp4"
        else:
            FrameReader(1, UniformSampler(2)).video(data)  # the first frame and the last
        return data, suffix_of(name)
    except BadSampleError as error:
        detail = error.detail if reading[0] in error.detail else f"{reading[0]}: {error.detail}"
        raise BadSampleError(error.reason, detail) from None


def verify_shard(url: str, timeout_s: float = 30.0) -> Outcome:
    """Verifies every sample of a shard: reads its headers, its JSON and every frame.

    It makes the index again from the headers. A stored index that differs is a bad item too.
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
        for suffix in _check_text(raw):
            with naming(suffix):
                count_frames(raw[suffix]) if is_video(suffix) else open_image(raw[suffix])
    except BadSampleError as error:
        return Outcome(bad=[BadItem(url, key, error.reason, error.detail)])
    return Outcome(good=1)


def _check_text(raw: dict[str, Any]) -> list[str]:
    """Returns the visuals of a sample in slot order. Parses both answers of a pair."""
    entry = read_entry(raw)
    if not isinstance(entry, dict) or "chosen" not in entry:
        return parse_entry(entry, raw)[1]
    parsed = [parse_entry(one, raw) for one in with_answers(entry)]
    return parsed[0][1]
