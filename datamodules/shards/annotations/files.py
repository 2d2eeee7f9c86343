"""Annotation files -> entries with their place in the file. Reports what is not JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.formats import READERS

#: First bytes of other files, with their kind.
_OTHER_FILES = {
    b"\x1f\x8b": "gzip data: unpack it with gunzip",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: write its rows as .jsonl, such as by pandas' "
    "to_json(orient='records', lines=True)",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "HTML or XML, perhaps the page of an error: download the file itself",
}
_CONVERSATIONS = {"conversations", "conversation", "messages", "query", "instruction"}
_ANSWERS = {"prompt", "chosen", "caption"}


class Annotation(NamedTuple):
    """An entry and its place in the file in words: `entry 3` (counted from 0) or `line 4`."""

    where: str
    entry: Any
    fault: BadSampleError | None = None  # set if the line cannot be read; then `entry` is None


def read_annotations(path: Path) -> list[Annotation]:
    """Returns the entries of a JSON list, or of a file with one JSON object per line.

    The content decides, not the name; a name may end in `.json` or `.jsonl`. A line that is not
    JSON is one bad entry. The encoding is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: the file is neither, or no line can be read; the message names the place.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"annotations {str(path)!r} cannot be read: {error}") from None
    other = next((what for start, what in _OTHER_FILES.items() if data.startswith(start)), None)
    if other:
        raise ValueError(f"annotations {str(path)!r} cannot be read: it is {other}")
    try:
        lines = list(_lines(data))
    except UnicodeDecodeError as error:
        raise ValueError(f"annotations {str(path)!r} cannot be read: {error}") from None
    whole = _whole(lines, path) if _may_be_whole(lines, path) else None
    if whole is not None:
        return whole
    read = [_read_line(f"line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if read and all(annotation.fault for annotation in read):
        where, _, fault = read[0]
        raise ValueError(f"{path}, {where}: {fault and fault.detail}")
    return read


def _lines(data: bytes) -> Iterator[bytes]:
    r"""Yields the lines in UTF-8. Only "\n" ends a line, not other separators such as U+2028."""
    encoding = json.detect_encoding(data)
    if not encoding.startswith("utf-8"):
        data = data.decode(encoding).encode()
    yield from data.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def _is_lines(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _may_be_whole(lines: Sequence[bytes], path: Path) -> bool:
    """Returns True if the file may be one JSON value: a list, or lines that are not entries."""
    filled = [line.strip() for line in lines if line.strip()]
    if not filled or filled[0].startswith(b"["):
        return bool(filled) or not _is_lines(path)
    alone = len(filled) > 1 and filled[0].startswith(b"{") and not _read_line("", filled[0]).fault
    return not _is_lines(path) and not alone


def _whole(lines: Sequence[bytes], path: Path) -> list[Annotation] | None:
    """Returns the entries of a file that is one list or one entry, or None if it has lines."""
    try:
        entries = parse_json(b"\n".join(lines))
    except BadSampleError as error:
        if _is_lines(path):
            return None
        raise ValueError(f"{path}: {error.detail}") from None
    if isinstance(entries, dict) and entries.keys() & (_CONVERSATIONS | _ANSWERS | READERS.keys()):
        entries = [entries]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {_expected(entries)}")
    return [Annotation(f"entry {n}", entry) for n, entry in enumerate(entries)]


def _expected(found: Any) -> str:
    fields = found.items() if isinstance(found, dict) else ()
    lists = [name for name, value in fields if isinstance(value, list)]
    inside = f"; write only the list {lists[0]!r} into the file" if lists else ""
    return f"expected a list of entries, or one object per line{inside}"


def _read_line(where: str, line: bytes) -> Annotation:
    try:
        return Annotation(where, parse_json(line))
    except BadSampleError as error:
        return Annotation(where, None, error)


def parse_json(data: bytes) -> Any:
    """Parses standard JSON. Also reads NaN as a missing value, because pandas writes it.

    Raises:
        BadSampleError: bad_json, also for an object with two different values of one field.
    """
    try:
        return json.loads(data, parse_constant=_constant, object_pairs_hook=_without_twins)
    except UnicodeDecodeError as error:
        byte, at = data[error.start], error.start
        raise BadSampleError("bad_json", f"not UTF-8: byte {byte:#04x} at {at}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        detail = f"{error.msg}: {line}character {error.colno}"
        raise BadSampleError("bad_json", detail) from None
    except (ValueError, RecursionError) as error:  # too large numbers, too deep nesting
        raise BadSampleError("bad_json", str(error)) from None


def _constant(name: str) -> None:
    if name != "NaN":
        raise ValueError(f"{name} is not JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        for name in names:
            if any(other == name and value != found[name] for other, value in pairs):
                raise ValueError(f"{name!r} appears twice in one object, with different values")
    return found
