"""The lengths of samples, measured once and stored beside the index of their shard.

`shard.tar.len` is an .npz of plain arrays. They hold facts that do not depend on a model:

    text     (s)  int32    tokens of the conversation without visuals, for s samples
    visuals  (s)  int32    number of visuals of each sample
    frames   (v)  int32    frames of each of the v visuals in order; 0 for an image
    seconds  (v)  float64  time from the first to the last frame of each visual

The frame sampler and the tokens per frame turn them into LLM tokens.
"""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from datamodules.stream.index import Manifest, Shard, index_path, lengths_path
from datamodules.stream.order import StreamOptions


@runtime_checkable
class Sampler(Protocol):
    def count(self, frames: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Returns the number of frames sampled from each video."""
        ...


class Lengths(NamedTuple):
    """The lengths of the samples of one shard, in the columns described above."""

    text: np.ndarray
    visuals: np.ndarray
    frames: np.ndarray
    seconds: np.ndarray

    def tokens(
        self, sampler: Sampler, per_frame: float, per_image: float
    ) -> Int32[np.ndarray, " s"]:
        """Returns the LLM tokens of each sample, rounded up."""
        taken = sampler.count(self.frames, self.seconds) * per_frame
        taken = np.where(self.frames == 0, per_image, taken)
        owner = np.repeat(np.arange(len(self.text)), self.visuals)
        visual = np.bincount(owner, weights=taken, minlength=len(self.text))
        return (self.text + np.ceil(visual)).astype(np.int32)


def read_tokens(
    manifest: Manifest, sampler: object, options: StreamOptions
) -> Int32[np.ndarray, " s"]:
    """Returns the LLM tokens of every sample, from the lengths of `ropelab-shards measure`.

    Raises:
        ValueError: a shard was not measured, or changed after that; or the frame sampler has no
            `count`.
    """
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"data.frames.sampler: {type(sampler).__name__} has no `count`, the method that "
            "returns the number of frames; add it, or set data.stream.max_tokens=null"
        )
    per_frame = float(options.tokens_per_frame or 0)
    per_image = per_frame if options.tokens_per_image is None else float(options.tokens_per_image)

    def read(shard: Shard) -> np.ndarray:
        return read_lengths(shard).tokens(sampler, per_frame, per_image)

    with ThreadPoolExecutor(8) as pool:  # threads mostly wait for storage
        return np.concatenate(list(pool.map(read, manifest.shards)))


def read_lengths(shard: Shard) -> Lengths:
    """Loads the stored lengths of a shard.

    Raises:
        ValueError: they are missing or unreadable, or the shard now has another number of samples.
    """
    advice = f"run: ropelab-shards measure {shard.url}"
    try:
        with np.load(place_of(shard), allow_pickle=False) as arrays:
            lengths = Lengths(*(arrays[name] for name in Lengths._fields))
    except FileNotFoundError:
        raise ValueError(
            f"data.stream.max_tokens needs the lengths of samples, but {shard.url} has none; "
            f"{advice}"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place_of(shard)} cannot be read ({error}); {advice}") from None
    if len(lengths.text) != shard.count:
        raise ValueError(
            f"{place_of(shard)} has the lengths of {len(lengths.text)} samples, but the shard has "
            f"{shard.count}; {advice}"
        )
    return lengths


def place_of(shard: Shard) -> Path:
    """Returns the path of a shard's lengths."""
    return lengths_path(shard.index or index_path(shard.url))
