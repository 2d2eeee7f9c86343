"""Measures the lengths of samples and stores them beside the index of their shard."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from datamodules.batch import VISUAL_SLOT
from datamodules.common.atomic import write_whole
from datamodules.errors import BadSampleError
from datamodules.sample.conversation import ConversationEncoder, parse_sample
from datamodules.shards.pack import BadItem, Outcome
from datamodules.stream.index import Shard, info_path, read_counts
from datamodules.stream.lengths import place_of
from datamodules.stream.reading.source import open_source
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import is_video, naming
from datamodules.visuals.packets import frame_times

_ANY_LENGTH = 2**31  # tokens; nothing is cut


def measure_shard(shard: Shard, tokenizer: str | None, timeout_s: float = 30.0) -> Outcome:
    """Measures every sample of a shard and stores the lengths.

    A bad sample has length 0, because another sample replaces it in training.

    Raises:
        OSError: the lengths cannot be written beside the index.
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
    place = place_of(shard)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, file.getvalue(), shared=True)
    except OSError as error:
        raise OSError(
            f"{place} cannot be written ({error.strerror}); set --index-cache to a folder that can "
            "be written"
        ) from None
    return outcome


@contextmanager
def counts_stay_current(urls: list[str]) -> Iterator[None]:
    """Keeps the sample counts of folders valid while files are written beside their shards."""
    folders = {url.rpartition("/")[0] for url in urls}
    current = [info_path(folder) for folder in folders if read_counts(folder)]
    yield
    for info in current:
        os.utime(info)


def _measure(
    raw: dict[str, Any], conversation: ConversationEncoder
) -> tuple[int, list[tuple[int, float]]]:
    """Returns the text tokens of a sample, and (frames, seconds) of each visual."""
    turns, suffixes = parse_sample(raw)
    ids = conversation(turns).input_ids
    visuals = []
    for suffix in suffixes:
        with naming(suffix):
            times = frame_times(raw[suffix]) if is_video(suffix) else []
        visuals.append((len(times), times[-1] - times[0] if times else 0.0))
    return len(ids) - ids.count(VISUAL_SLOT), visuals


@lru_cache(maxsize=1)  # loading a tokenizer takes longer than measuring a small shard
def _encoder(tokenizer: str | None) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, max_length=_ANY_LENGTH)
