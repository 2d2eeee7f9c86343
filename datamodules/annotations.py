"""Annotations as their authors publish them -> the one form that shards hold.

    {"conversations": [{"from": "human", "value": "<video>\\nWhat is it?"},
                       {"from": "gpt", "value": "A bike."}], "video": "a.mp4"}

or, of two answers to the same question, one that is preferred,

    {"conversations": [{"from": "human", "value": "<video>\\nWhat is it?"}],
     "chosen": "A bike.", "rejected": "A cat.", "video": "a.mp4"}

A format is known by its fields, never by the name of its file; fields that mean nothing here are
kept. LLaVA's own form (LLaVA-1.5, LLaVA-Video-178K, M4-Instruct, LLaVA-Hound's instructions) is
that of shards already.
"""

import re
from collections.abc import Iterator
from typing import Any

from datamodules.batch import BadSampleError

_SLOT = re.compile(r"\s*<(?:image|video)>\s*")


def to_conversation(entry: Any) -> dict[str, Any]:
    """One published entry in the form of shards.

    Raises:
        BadSampleError: missing_field, bad_field.
    """
    if not isinstance(entry, dict):
        raise BadSampleError("missing_field", "conversations")
    if "chosen" in entry or "rejected" in entry:
        return read_preference(entry)
    if "QA" in entry:
        return read_videochat2(entry)
    return entry


def read_preference(entry: dict[str, Any]) -> dict[str, Any]:
    """LLaVA-Hound's pairs: `prompt` (or turns), `chosen` and `rejected`, as texts or as turns.

    The visual stands before the prompt, wherever its slot was: so LLaVA-Hound's and LLaVA-NeXT's
    code read it. Its `answer`, of which both are variants, is left out.
    """
    kept = {name: value for name, value in entry.items() if name not in ("prompt", "answer")}
    if "conversations" not in entry:
        asked = _text(entry, "prompt")
        slot = _slot(entry)
        kept["conversations"] = [{"from": "human", "value": slot + _SLOT.sub(" ", asked).strip()}]
    for name in ("chosen", "rejected"):
        turn = entry.get(name)
        kept[name] = _text(turn, "value") if isinstance(turn, dict) else _text(entry, name)
        if not kept[name].strip():
            raise BadSampleError("empty_conversation", f"{name} is empty")
    return kept


def read_videochat2(entry: dict[str, Any]) -> dict[str, Any]:
    """VideoChat2-IT: `QA` holds instruction `i`, question `q` (captions have none), answer `a`.

    The first instruction goes before the first question: VideoChat2 writes it once, before the
    video, and guides its query by both. `start` and `end`, in seconds, say which part of the video
    is meant.
    """
    pairs = entry["QA"]
    if not isinstance(pairs, list) or not pairs:
        raise BadSampleError("empty_conversation", "no pair in QA")
    turns = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise BadSampleError("bad_field", f"QA {number} is no object")
        question, answer = _text(pair, "q", ""), _text(pair, "a")
        instruction = _text(pair, "i", "") if number == 0 or not question.strip() else ""
        asked = "\n".join(part for part in (instruction.strip(), question.strip()) if part)
        if number and not asked:
            raise BadSampleError("missing_field", f"q of QA {number}")
        slot = "" if number else _slot(entry)
        turns += [{"from": "human", "value": slot + asked}, {"from": "gpt", "value": answer}]
    kept = {name: value for name, value in entry.items() if name != "QA"}
    return {**kept, "conversations": turns}


def with_answers(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An entry with each of its answers as the last turn: of a pair both, of others itself."""
    if "chosen" not in entry:
        yield entry
        return
    asked = entry.get("conversations")
    for name in ("chosen", "rejected"):
        answer = {"from": "gpt", "value": entry.get(name)}
        yield {"conversations": [*(asked if isinstance(asked, list) else []), answer]}


def _slot(entry: dict[str, Any]) -> str:
    """Slots of an entry whose text has none: one for each of its visuals."""
    slots = []
    for word in ("image", "video"):
        value = entry.get(word) or []
        slots += [f"<{word}>\n"] * (len(value) if isinstance(value, list) else 1)
    return "".join(slots)


def _text(entry: dict[str, Any], name: str, missing: str | None = None) -> str:
    value = entry.get(name, missing)
    if value is None:
        raise BadSampleError("missing_field", name)
    if not isinstance(value, str):
        raise BadSampleError("bad_field", f"{name} is no text")
    return value
