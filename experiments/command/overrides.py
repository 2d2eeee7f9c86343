"""Reads overrides of a command line as values, so that `2e-3` and `0.002` are the same setting.

Names of run directories and factors of ablations come from these values, not from typed words.
This module reads numbers, booleans, null and plain words itself, so that programs that list
hundreds of runs need not import Hydra. Hydra's own parser reads lists, dicts and quotes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_FIRST_WITH_EXPONENT = 1e16  # from here on Python writes floats as 1e16
_NAMED = {"null": None, "true": True, "false": False}
_NAMED |= {
    f"{sign}{name}": float(f"{sign}{name}") for sign in ("", "+", "-") for name in ("nan", "inf")
}


class Deleted:
    """The value of an override such as `~callbacks.generations`."""

    def __repr__(self) -> str:
        return "~"


DELETED = Deleted()


def read_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Returns the value of each overridden key or group, as Hydra would set it.

    The last override of a key counts. A dict counts as overrides of its keys, because Hydra merges
    it. `key=` (change) and `+key=` (add) are treated alike.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, _, text = str(word).partition("=")
        value = DELETED if name.startswith("~") else read_value(text)
        for key, leaf in _leaves(name.lstrip("+~"), value):
            for below in [known for known in values if known.startswith(f"{key}.")]:
                del values[below]
            values.pop(key, None)
            values[key] = leaf
    return values


def read_value(text: str) -> Any:
    """Returns the value that Hydra reads from text after `key=`. Invalid text stays a string."""
    if text.lower() in _NAMED:
        return _NAMED[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _WORD.fullmatch(text):
        return text
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text


def show_value(value: Any) -> str:
    """Returns the unique text of a value. Equal values have equal texts, and only those."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, str):
        ambiguous = value[:1] in ("", "[", "{", '"', "'") or not isinstance(_bare(value), str)
        return json.dumps(value, ensure_ascii=False) if ambiguous else value
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_inner, value))}]"
    if isinstance(value, dict):
        pairs = sorted((_inner(key), _inner(child)) for key, child in value.items())
        return "{" + ",".join(f"{key}:{child}" for key, child in pairs) + "}"
    return str(value)


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns the last part of each dotted key, or the whole key if two have the same last part."""
    last = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: short if counts[short] == 1 else key for key, short in last.items()}


def _number(value: int | float) -> str:
    """Returns the same text for equal numbers: 1 and 1.0, or 10000000000000000 and 1e16."""
    if value == value // 1 and abs(value) < _FIRST_WITH_EXPONENT:
        return str(int(value))
    try:
        exact = float(value)
    except OverflowError:
        return str(value)
    if exact != value and value == value:  # a long integer that no float equals
        return str(value)
    return re.sub(r"e([+-])0*", r"e\1", repr(exact)).replace("e+", "e")


def _inner(value: Any) -> str:
    """Returns the text of an item in a list or dict. Text with commas or brackets needs quotes."""
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return json.dumps(value, ensure_ascii=False)
    return show_value(value)


def _bare(text: str) -> Any:
    """Returns the value of the unquoted text: a number or named value, else the text itself."""
    if text.lower() in _NAMED or _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text):
        return read_value(text)
    return text


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from _leaves(f"{key}.{name}", child)
    else:
        yield key, value
