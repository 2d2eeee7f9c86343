"""File names: how people count in them, and which ones belong to the operating system alone."""

import re
from collections.abc import Iterable
from fractions import Fraction

_DIGITS = re.compile(r"([0-9]+)")
_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\.[a-z]+[0-9]?", re.IGNORECASE)
_SIDECARS = {".ds_store", "thumbs.db", "desktop.ini"}
_SIDECAR_FOLDER = "__macosx"


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts files of one folder as people count: `2.jpg` before `10.jpg`.

    Where all of them are numbers, they stand by their values: `0.25.jpg` before `0.5.jpg`. Chapters
    such as `1.1.jpg` and `1.10.jpg` are no numbers, as they would be the same one.
    """
    natural = sorted(names, key=natural_key)
    matches = [_SECONDS.fullmatch(name) for name in natural]
    values = [Fraction(match[1]) for match in matches if match]
    if len(values) < len(natural) or len(set(values)) < len(values):
        return natural
    return [name for _, name in sorted(zip(values, natural, strict=True))]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A key to sort by: `2.jpg` before `10.jpg`, `a2.jpg` before `B1.jpg`."""
    parts = _DIGITS.split(name.casefold())  # text, digits, text, ..., text
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def is_sidecar(path: str) -> bool:
    """Whether macOS or Windows has put this file beside the user's: `._a.jpg`, `.DS_Store`."""
    *folders, name = path.lower().split("/")
    return name.startswith("._") or name in _SIDECARS or _SIDECAR_FOLDER in [*folders, name]
