"""One stable hash. Its values are part of names, checkpoints and caches."""

import re
from pathlib import Path

from datamodules.common.digest import digest, digest_all, digest_settings, number

ROOT = Path(__file__).parents[3]


def test_values_never_change():
    assert digest("shard-000000.tar 9 20480\n") == "f4bcff4afaf7110c"
    assert digest("a", b"b", length=8) == digest("ab", length=8) == "fb8e20fc"
    assert digest_all((piece for piece in ("a", memoryview(b"b"))), 8) == "fb8e20fc"
    assert digest_settings({"b": 1, "a": [None, 0.5]}) == "175110073d47"
    assert number("shard-000000.tar/7") == -7378988514274520758


def test_the_order_of_keys_does_not_matter():
    assert digest_settings({"a": 1, "b": 2}) == digest_settings({"b": 2, "a": 1})
    assert digest_settings({"a": 1, "b": 2}) != digest_settings({"a": 2, "b": 1})


def test_there_is_one_place_that_hashes():
    files = [
        p
        for room in ("datamodules", "lightning_modules", "experiments")
        for p in (ROOT / room).rglob("*.py")
    ]
    hashing = r"\b(hashlib|xxhash|crc32|blake2|md5)\b|(?<![\w.])hash\("
    found = [p.name for p in files if re.search(hashing, p.read_text())]
    assert found == ["digest.py"]
