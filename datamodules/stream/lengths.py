"""How long samples are, measured once and kept beside the index of their shard.

`shard.tar.len` is an .npz of plain arrays that hold facts and no settings of a model:

    text     (s)  int32    tokens of the conversation without its visuals, of s samples
    visuals  (s)  int32    how many visuals it has
    frames   (v)  int32    frames of each of the v visuals in turn; 0 is an image
    seconds  (v)  float64  from its first frame to its last

What that makes in tokens of the LLM is told by the sampler of frames and the pooler's grid.
"""

import io
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from datamodules.batch import VISUAL_SLOT, BadSampleError
from datamodules.sample.conversation import ConversationEncoder, parse_sample
from datamodules.shards.pack import BadItem, Outcome
from datamodules.stream.index import (
    Manifest,
    Shard,
    index_path,
    info_path,
    lengths_path,
    read_counts,
    write_whole,
)
from datamodules.stream.order import StreamOptions
from datamodules.stream.source import open_source
from datamodules.stream.tar import untar_sample
from datamodules.visuals.frames import is_video, naming
from datamodules.visuals.packets import frame_times

_ANY_LENGTH = 2**31  # tokens: nothing is cut here


@runtime_checkable
class Sampler(Protocol):
    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """How many frames are taken of each video."""
        ...


class Lengths(NamedTuple):
    """Of the samples of one shard; the columns as above."""

    text: np.ndarray
    visuals: np.ndarray
    frames: np.ndarray
    seconds: np.ndarray

    def tokens(
        self, sampler: Sampler, per_frame: float, per_image: float
    ) -> Int32[np.ndarray, " s"]:
        """Tokens of each sample in the LLM, rounded up."""
        taken = sampler.count(self.frames, self.seconds) * per_frame
        taken = np.where(self.frames == 0, per_image, taken)
        owner = np.repeat(np.arange(len(self.text)), self.visuals)
        visual = np.bincount(owner, weights=taken, minlength=len(self.text))
        return (self.text + np.ceil(visual)).astype(np.int32)


def read_tokens(
    manifest: Manifest, sampler: object, options: StreamOptions
) -> Int32[np.ndarray, " s"]:
    """Tokens of every sample of all shards, by what `ropelab-shards measure` has kept.

    Raises:
        ValueError: a shard was not measured, or is another one since; or a sampler of frames
            without `count`.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"data.frames.sampler: {type(sampler).__name__} has no `count`, which tells how many "
            "frames it takes; add it, or set data.stream.max_tokens=null"
        )
    per_frame = float(options.tokens_per_frame or 0)
    per_image = per_frame if options.tokens_per_image is None else float(options.tokens_per_image)

    def read(shard: Shard) -> np.ndarray:
        return read_lengths(shard).tokens(sampler, per_frame, per_image)

    with ThreadPoolExecutor(8) as pool:  # waits for storage, hardly computes
        return np.concatenate(list(pool.map(read, manifest.shards)))


def read_lengths(shard: Shard) -> Lengths:
    """What was measured of a shard.

    Raises:
        ValueError: nothing, or of other samples than it has now.
    """
    advice = f"run: ropelab-shards measure {shard.url}"
    try:
        with np.load(_place(shard), allow_pickle=False) as arrays:
            lengths = Lengths(*(arrays[name] for name in Lengths._fields))
    except FileNotFoundError:
        raise ValueError(
            f"data.stream.max_tokens needs lengths of samples, {shard.url} has none; {advice}"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{_place(shard)} cannot be read ({error}); {advice}") from None
    if len(lengths.text) != shard.count:
        raise ValueError(
            f"{_place(shard)} has the lengths of {len(lengths.text)} samples, the shard has "
            f"{shard.count}; {advice}"
        )
    return lengths


def measure_shard(shard: Shard, tokenizer: str | None, timeout_s: float = 30.0) -> Outcome:
    """Measures every sample and keeps the lengths; a bad one has none, as its place goes to others.

    Raises:
        OSError: they cannot be written where the index lies.
    """
    outcome, rows = Outcome(), list[tuple[int, list[tuple[int, float]]]]()
    source = open_source(shard.url, timeout_s)
    try:
        for number, (start, end) in enumerate(pairwise(shard.read_offsets())):
            try:
                raw = untar_sample(source.read(int(start), int(end)), shard.url)
                rows.append(_measure(raw, _encoder(tokenizer)))
                outcome.good += 1
            except BadSampleError as error:
                rows.append((0, []))
                outcome.bad.append(BadItem(shard.url, f"#{number}", error.reason, error.detail))
    finally:
        source.close()
    visuals = [visual for _, found in rows for visual in found]
    columns = {
        "text": np.array([text for text, _ in rows], dtype=np.int32),
        "visuals": np.array([len(found) for _, found in rows], dtype=np.int32),
        "frames": np.array([frames for frames, _ in visuals], dtype=np.int32),
        "seconds": np.array([seconds for _, seconds in visuals], dtype=np.float64),
    }
    file = io.BytesIO()
    np.savez(file, **columns)
    if not write_whole(file.getvalue(), _place(shard)):
        raise OSError(f"{_place(shard)} cannot be written; set --index-cache to a folder that can")
    return outcome


@contextmanager
def counts_stay_current(urls: list[str]) -> Iterator[None]:
    """Files that are written beside shards do not change how many samples these hold."""
    folders = {url.rpartition("/")[0] for url in urls}
    current = [info_path(folder) for folder in folders if read_counts(folder)]
    yield
    for info in current:
        os.utime(info)


def _measure(
    raw: dict[str, Any], conversation: ConversationEncoder
) -> tuple[int, list[tuple[int, float]]]:
    """Tokens of the text, and (frames, seconds) of each visual."""
    turns, suffixes = parse_sample(raw)
    ids = conversation(turns).input_ids
    visuals = []
    for suffix in suffixes:
        with naming(suffix):
            times = frame_times(raw[suffix]) if is_video(suffix) else []
        visuals.append((len(times), times[-1] - times[0] if times else 0.0))
    return len(ids) - ids.count(VISUAL_SLOT), visuals


@lru_cache(maxsize=1)  # loading a tokenizer takes longer than many a shard
def _encoder(tokenizer: str | None) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, max_length=_ANY_LENGTH)


def _place(shard: Shard) -> Path:
    return lengths_path(shard.index or index_path(shard.url))
