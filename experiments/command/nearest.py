"""Finds the existing key that a misspelt one stands for."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

#: Least similarity of two keys, and of their last parts, for a spelling suggestion. 1 is equal.
ALIKE = 0.75


def nearest(key: str, known: Sequence[str]) -> str | None:
    """Returns the known key with the most similar spelling, else one with the same last part."""
    last = key.rpartition(".")[2]
    ends = {other: other.rpartition(".")[2] for other in known if other != key}
    same_end = [other for other, end in ends.items() if end == last]
    like_end = [other for other, end in ends.items() if get_close_matches(last, [end], 1, ALIKE)]
    found = get_close_matches(key, like_end, 1, ALIKE) or get_close_matches(key, same_end, 1, 0.0)
    return found[0] if found else None


def dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every node below a container, without those of Hydra."""
    if isinstance(node, dict):
        for name, child in node.items():
            if name != "hydra" or prefix:
                yield f"{prefix}{name}"
                yield from dotted(child, f"{prefix}{name}.")
