"""Reads the part of a video that an entry refers to. Refuses it if it is not in seconds.

{"video": "a.mp4", "start": 0.5, "end": 2}        VideoChat2
{"video": "a.mp4", "start_time": 0.5, "end_time": 2}
{"video": "a.mp4", "timestamps": [0.5, 2]}
"""

import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.fields import words_of

# Words in field names, as returned by `words_of`: for a start, an end, and both in a list.
_STARTS, _ENDS = {"start", "begin"}, {"end", "stop"}
_BOTH = {"span", "timestamp"}
# These words mean a part only if the value is a range: not in `clip: "x"`, `frame_interval: 4`.
_IF_RANGES = {"clip", "segment", "interval", "range"}
_RANGE = re.compile(r"\s*[\d.:]+\s*s?\s*(?:[-–,~]|to)\s*[\d.:]+\s*s?\s*$")  # noqa: RUF001
_PARTS = _STARTS | _ENDS | _BOTH | _IF_RANGES
# With one of these words, the number is in seconds. With the others, its unit is unknown.
_OF_SECONDS = {"video", "time", "sec", "second", "s"}
_BESIDE = _OF_SECONDS | {"ms", "frame", "idx", "index"}
_REMEDY = "give start and end in seconds, or add --ignore-field"


class Span(NamedTuple):
    """The start and end of a part of a video, in seconds. `end` may be infinite."""

    start: float
    end: float


def take_span(
    entry: dict[str, Any], ignored: Collection[str] = ()
) -> tuple[dict[str, Any], Span | None, list[str]]:
    """Returns (entry without the fields of the part, the part or None, names of those fields).

    None means the whole video. A part without a start begins with the video, and a part without
    an end ends with it.

    Raises:
        BadSampleError: bad_field.
    """
    if not entry.get("video"):
        return entry, None, []
    fields = [
        name for name, value in entry.items() if name not in ignored and _names_part(name, value)
    ]
    read = {name: _ends_of(name, entry) for name in fields}
    start = _agreed([(name, ends[0]) for name, ends in read.items()])
    end = _agreed([(name, ends[1]) for name, ends in read.items()])
    span = Span(0.0 if start is None else start, math.inf if end is None else end)
    if not 0 <= span.start < span.end:
        raise BadSampleError(
            "bad_field",
            f"{' and '.join(fields)}: start {start} and end {end}, but it must be 0 <= start < end",
        )
    if span == (0, math.inf):
        return entry, None, []
    return {name: value for name, value in entry.items() if name not in fields}, span, fields


def _names_part(name: str, value: Any) -> bool:
    words = set(words_of(name))
    if value in (None, "", [], {}) or not words <= _PARTS | _BESIDE:
        return False
    sure = isinstance(value, list | dict) or (isinstance(value, str) and _RANGE.match(value))
    return bool(words & (_PARTS if sure else _PARTS - _IF_RANGES))


def _ends_of(name: str, entry: dict[str, Any]) -> tuple[float | None, float | None]:
    """Returns the (start, end) that a field gives, with None for a missing one."""
    value, video = entry[name], entry["video"]
    one_video = not isinstance(video, list) or len(video) == 1
    kinds = set(words_of(name)) - _OF_SECONDS
    if len(kinds) == 1 and kinds <= _STARTS | _ENDS:
        seconds = _seconds(value)
        if seconds is not None:
            return (seconds, None) if kinds <= _STARTS else (None, seconds)
    elif len(kinds) == 1 and kinds <= _PARTS and isinstance(value, list) and one_video:
        start, end = map(_seconds, value) if len(value) == 2 else (None, None)
        if start is not None and end is not None:
            return start, end
    raise BadSampleError(
        "bad_field", f"{name!r} ({value!r:.60}) seems to name a part of the video: {_REMEDY} {name}"
    )


def _seconds(value: Any) -> float | None:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None


def _agreed(said: list[tuple[str, float | None]]) -> float | None:
    """Returns the value that all fields give for one end of the part, or None.

    Raises:
        BadSampleError: bad_field: two fields differ.
    """
    given = [(name, value) for name, value in said if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise BadSampleError(
                "bad_field", f"{given[0][0]} and {name} name different parts: keep one"
            )
    return given[0][1] if given else None
