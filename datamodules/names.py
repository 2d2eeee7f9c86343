"""File names: how people count in them, and which ones belong to the operating system alone."""

import re

_DIGITS = re.compile(r"([0-9]+)")
_SIDECARS = {".ds_store", "thumbs.db", "desktop.ini"}
_SIDECAR_FOLDER = "__macosx"


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A key to sort by: `2.jpg` before `10.jpg`, `a2.jpg` before `B1.jpg`."""
    parts = _DIGITS.split(name.casefold())  # text, digits, text, ..., text
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], name


def is_sidecar(path: str) -> bool:
    """Whether macOS or Windows has put this file beside the user's: `._a.jpg`, `.DS_Store`."""
    *folders, name = path.lower().split("/")
    return name.startswith("._") or name in _SIDECARS or _SIDECAR_FOLDER in [*folders, name]
