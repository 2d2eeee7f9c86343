"""File names: natural sorting, and detection of files that only the operating system uses."""

import re
from collections.abc import Iterable
from fractions import Fraction

_DIGITS = re.compile(r"([0-9]+)")
_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\.[a-z]+[0-9]?", re.IGNORECASE)
_SIDECARS = {".ds_store", "thumbs.db", "desktop.ini"}
_SIDECAR_FOLDER = "__macosx"


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts the files of one folder in natural order: `2.jpg` before `10.jpg`.

    If all names are different numbers, they are sorted by value: `0.25.jpg` before `0.5.jpg`.
    Chapters such as `1.1.jpg` and `1.10.jpg` have the same value, so they keep natural order.
    """
    natural = sorted(names, key=natural_key)
    matches = [_SECONDS.fullmatch(name) for name in natural]
    values = [Fraction(match[1]) for match in matches if match]
    if len(values) < len(natural) or len(set(values)) < len(values):
        return natural
    return [name for _, name in sorted(zip(values, natural, strict=True))]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that puts `2.jpg` before `10.jpg` and `a2.jpg` before `B1.jpg`."""
    parts = _DIGITS.split(name.casefold())  # text, digits, text, ..., text
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def is_sidecar(path: str) -> bool:
    """Returns True for files that macOS or Windows adds by itself: `._a.jpg`, `.DS_Store`."""
    *folders, name = path.lower().split("/")
    return name.startswith("._") or name in _SIDECARS or _SIDECAR_FOLDER in [*folders, name]
