"""Hashes that are the same in every process, on every machine, and in every version.

Names of runs, checkpoints, caches and the merging of ranks depend on them. A change of a value here
makes finished work unknown.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def digest(*pieces: str | bytes, length: int = 16) -> str:
    """Returns `length` hexadecimal digits of the SHA-256 of the joined pieces."""
    return digest_all(pieces, length)


def digest_all(pieces: Iterable[str | bytes | memoryview], length: int = 16) -> str:
    """Returns the same as `digest`, of pieces that need not be in memory together."""
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(piece.encode() if isinstance(piece, str) else piece)
    return hashed.hexdigest()[:length]


def digest_settings(settings: Any, length: int = 12) -> str:
    """Returns a digest of plain containers. The order of keys does not matter."""
    return digest(json.dumps(settings, sort_keys=True, default=str), length=length)


def number(text: str) -> int:
    """Returns a signed 64-bit number for a text, because ranks exchange tensors, not strings."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
