"""Reads needles and haystacks from shards."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from datamodules.errors import BadSampleError
from datamodules.sample.conversation import Turn, parse_sample
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FrameReader, is_video, naming


@dataclass(frozen=True)
class Needle:
    """A picture, and a question that only this picture answers."""

    frame: UInt8[Tensor, "c h w"]
    question: str
    answer: str
    key: str


def read_clips(shards: str | Iterable[str], frames: FrameReader) -> list[UInt8[Tensor, "_t c h w"]]:
    """Returns all videos of the shards, in shard order.

    Raises:
        BadSampleError: a sample cannot be read, or has no video.
    """
    clips = []
    for raw in _read_all(shards):
        with _named(raw):
            videos = [suffix for suffix in raw if is_video(suffix)]
            if not videos:
                raise BadSampleError("not_a_video", "a haystack needs a video")
            clips += [frames.read(suffix, raw[suffix]).frames for suffix in videos]
    return clips


def read_needles(shards: str | Iterable[str], frames: FrameReader) -> list[Needle]:
    """Returns the needles of the shards. Each sample is one image, one question and its answer.

    Raises:
        BadSampleError: a sample cannot be read, or is not a needle.
        ValueError: all needles have the same question.
    """
    needles = []
    for raw in _read_all(shards):
        with _named(raw):
            turns, suffixes = parse_sample(raw)
            if [turn.role for turn in turns] != ["user", "assistant"] or len(suffixes) != 1:
                raise BadSampleError(
                    "not_a_needle", "a needle has one image, one question and one answer"
                )
            with naming(suffixes[0]):
                picture = frames.image(raw[suffixes[0]])[0]
        question = turns[0].text.replace("<image>", "").strip()
        needles.append(Needle(picture, question, turns[1].text, raw["__key__"]))
    if len(by_question(needles)) < 2:
        raise ValueError(
            "needles of at least two questions are needed, because they are each other's "
            "distractors"
        )
    return needles


def _read_all(shards: str | Iterable[str]) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(shards)
    for fault in manifest.faults:
        if fault.reason == "shard_missing":
            hint = (
                f"{fault.detail}; set paths.data to the folder of the shards, or make some with "
                "`ropelab-shards demo`"
            )
            raise BadSampleError(fault.reason, hint, shard=fault.shard)
        raise fault
    reader = ShardReader(manifest, timeout_s=30.0)
    try:
        for number, shard in enumerate(manifest.shards):
            for sample in range(shard.count):
                with _named({"__url__": shard.url, "__key__": f"#{sample}"}):
                    raw = untar_sample(reader.read(number, sample), shard.url)
                yield raw
    finally:
        reader.close()


@contextmanager
def _named(raw: dict[str, Any]) -> Iterator[None]:
    """Adds the shard and key of a sample to its `BadSampleError`."""
    try:
        yield
    except BadSampleError as error:
        where = {"shard": raw["__url__"], "key": raw["__key__"]}
        raise BadSampleError(error.reason, error.detail, **where) from None


def turns_about(needles: Sequence[Needle]) -> list[Turn]:
    """Returns the turns of a conversation about one video, with a question per needle."""
    turns = []
    for number, needle in enumerate(needles):
        turns.append(Turn("user", needle.question if number else f"<video>\n{needle.question}"))
        turns.append(Turn("assistant", needle.answer))
    return turns


def by_question(needles: Sequence[Needle]) -> dict[str, list[int]]:
    """Groups needles by question: question -> indices of its needles."""
    groups: dict[str, list[int]] = {}
    for number, needle in enumerate(needles):
        groups.setdefault(needle.question, []).append(number)
    return groups
