"""Converts published annotations into the format of shards.

    {"conversations": [{"from": "human", "value": "<video>\\nWhat is it?"},
                       {"from": "gpt", "value": "A bike."}], "video": "a.mp4"}

or, for two answers to the same question, one of them preferred,

    {"conversations": [{"from": "human", "value": "<video>\\nWhat is it?"}],
     "chosen": "A bike.", "rejected": "A cat.", "video": "a.mp4"}

The fields of an entry decide its format, not the file name. Fields without a meaning here are
kept. LLaVA's format (LLaVA-1.5, LLaVA-Video-178K, M4-Instruct, LLaVA-Hound's instructions) is
already the format of shards. The formats of ms-swift, LLaMA-Factory, OpenAI and TRL are read if
they mean the same: `messages`, `query` and `response`, `instruction` and `output`, `images`,
`video_path`, … Any other field that seems to name a visual is refused, not dropped. So is a mark
that excludes an answer from the loss.
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.fields import refuse_unlearnt, refuse_visuals
from datamodules.shards.annotations.turns import file_names, take_tags, to_turns, with_slots

_SLOT = re.compile(r"\s*<(?:image|video)>\s*")
#: Other names of the fields `image` and `video`.
_VISUALS = {
    "image": (
        "images",
        "image_path",
        "image_paths",
        "image_file",
        "image_files",
        "img",
        "img_path",
    ),
    "video": ("videos", "video_path", "video_paths", "video_file", "video_files"),
}
# (question, more of it, answer) of ms-swift and LLaMA-Factory
_PAIRS = (("query", None, "response"), ("instruction", "input", "output"))
# Fields that are read, beside those of `READERS`. A null counts as a missing field: pandas writes
# one in every row without the field.
_READ = {"conversations", "conversation", "messages", "prompt", "completion", "chosen", "rejected"}
_READ |= {"rejected_response", "rejected_messages", "query", "response", "history", "system"}
_READ |= {"instruction", "input", "output", "question"}


def to_conversation(entry: Any, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Converts one published entry into the format of shards.

    Args:
        entry: the entry as published.
        ignored: fields to ignore: they name unwanted visuals, or exclude answers from the loss.

    Raises:
        BadSampleError: missing_field, bad_field, empty_conversation.
    """
    if not isinstance(entry, dict):
        raise BadSampleError("missing_field", "conversations: the entry is not an object")
    fields = _READ | READERS.keys()
    entry = {n: value for n, value in entry.items() if value is not None or n not in fields}
    entry = _with_own_visuals(entry, ignored)
    refuse_unlearnt(entry, ignored)
    reader = next((read for field, read in READERS.items() if field in entry), None)
    own = _with_tagged(reader(entry) if reader else _with_system(_read_turns(entry)))
    seen = any(own.get(kind) for kind in _VISUALS)
    read = entry.keys() - own.keys() if reader else ()  # the fields that the reader took out
    refuse_visuals(entry, seen, (*_VISUALS, *read), ignored)
    return own


def _with_tagged(entry: dict[str, Any]) -> dict[str, Any]:
    """Moves files in questions, such as `<img>a.jpg</img>`, to the fields `image` and `video`."""
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        return entry
    turns, visuals = take_tags(turns, "conversations")
    for kind, files in visuals.items():
        entry = _with_files(entry, kind, files, "conversations")
    return {**entry, "conversations": turns}


def _with_own_visuals(entry: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Moves files of other fields to the fields `image` and `video`."""
    for kind, others in _VISUALS.items():
        for other in others:
            if other in ignored or other not in entry:
                continue
            names = file_names(entry[other] or [], other)
            kept = {name: value for name, value in entry.items() if name != other}
            entry = _with_files(kept, kind, names, other)
    return entry


def _with_files(entry: dict[str, Any], kind: str, names: list[str], where: str) -> dict[str, Any]:
    """Returns the entry with these files.

    Raises:
        BadSampleError: bad_field: the entry already has different files.
    """
    former = entry.get(kind)
    if not names:
        return entry
    if former and (former if isinstance(former, list) else [former]) != names:
        raise BadSampleError("bad_field", f"{kind} and {where} name different files: keep one")
    return {**entry, kind: names[0] if len(names) == 1 else names}


def _read_turns(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry with its turns under `conversations`.

    For a pair, these are the turns before the answers.
    """
    names = ("messages", "conversation", "conversations")
    given = [name for name in names if entry.get(name) is not None]
    if len(given) > 1:
        raise BadSampleError(
            "bad_field", f"{given[0]} and {given[1]} are two conversations: keep one"
        )
    field, entry = (given[0], entry) if given else _from_pair(entry)
    pair = "chosen" in entry or "rejected" in entry
    if field is None or (field == "conversations" and not _is_foreign(entry[field])):
        return read_preference(entry) if pair else entry
    turns, visuals = to_turns(entry[field], field)
    kept = {name: value for name, value in entry.items() if name != field}
    for kind, files in visuals.items():
        kept = _with_files(kept, kind, files, field)
    kept["conversations"] = with_slots(turns, _slots_of(kept))
    if "rejected_messages" in kept:
        raise BadSampleError(
            "bad_field", "rejected_messages is not read: give rejected_response instead"
        )
    if "rejected_response" in kept:  # ms-swift: the last answer is the one preferred
        *before, last = kept["conversations"]
        kept |= {"conversations": before, "chosen": last["value"]}
        kept["rejected"] = kept.pop("rejected_response")
    return read_preference(kept) if "chosen" in kept or "rejected" in kept else kept


def _is_foreign(turns: Any) -> bool:
    own = isinstance(turns, list) and all(isinstance(t, dict) for t in turns)
    return own and any(
        "role" in t or "human" in t or isinstance(t.get("value"), list) for t in turns
    )


def _from_pair(entry: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Converts question and answer fields into messages, with the messages of `history` first.

    These are `query` and `response`, `instruction`, `input` and `output`, or TRL's `prompt` and
    `completion`. Returns the name of the field with the messages (None: there are none), and the
    entry.
    """
    if isinstance(entry.get("prompt"), list) or "completion" in entry:  # TRL
        asked = _messages(entry, "prompt", "user")
        answers = _messages(entry, "completion", "assistant") if "completion" in entry else []
        kept = {n: value for n, value in entry.items() if n not in ("prompt", "completion")}
        return "messages", {**kept, "messages": [*asked, *answers]}
    for question, more, answer in _PAIRS:
        if question not in entry:
            continue
        asked = [_text(entry, question), _text(entry, more, "") if more else ""]
        history = entry.get("history") or []
        if not isinstance(history, list) or not all(
            isinstance(turn, list) and len(turn) == 2 for turn in history
        ):
            raise BadSampleError("bad_field", "history must be a list of [question, answer]")
        pairs = [*history, ["\n".join(filter(None, asked)), entry.get(answer)]]
        texts = [text for pair in pairs for text in pair]
        if entry.get(answer) is None:
            if "chosen" not in entry:
                raise BadSampleError("missing_field", answer)
            texts.pop()
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        dropped = (question, more, answer, "history")
        kept = {name: value for name, value in entry.items() if name not in dropped}
        return "messages", {**kept, "messages": messages}
    return None, entry


def _messages(entry: dict[str, Any], name: str, role: str) -> list[Any]:
    """Returns the messages of a field. A plain text becomes one message."""
    if isinstance(entry.get(name), list):
        return entry[name]
    return [{"role": role, "content": _text(entry, name)}]


def _with_system(entry: dict[str, Any]) -> dict[str, Any]:
    """Makes the text of the field `system` the first turn."""
    system, turns = entry.get("system"), entry.get("conversations")
    if (
        not isinstance(system, str)
        or not system.strip()
        or not isinstance(turns, list)
        or not turns
    ):
        return entry
    kept = {name: value for name, value in entry.items() if name != "system"}
    if isinstance(turns[0], dict) and turns[0].get("from") == "system":
        if turns[0].get("value") == system:
            return kept
        raise BadSampleError(
            "bad_field", "system and the first turn are two system prompts: keep one"
        )
    return {**kept, "conversations": [{"from": "system", "value": system}, *turns]}


def read_preference(entry: dict[str, Any]) -> dict[str, Any]:
    """Reads LLaVA-Hound's pairs: `prompt` (or turns), `chosen` and `rejected`, as texts or turns.

    The slot of the visual moves to the start of the prompt, as in LLaVA-Hound's and LLaVA-NeXT's
    code. The field `answer` is dropped: both answers are variants of it.
    """
    kept = {name: value for name, value in entry.items() if name not in ("prompt", "answer")}
    if "conversations" not in entry:
        asked = _text(entry, "prompt")
        slot = _slot(entry)
        kept["conversations"] = [{"from": "human", "value": slot + _SLOT.sub(" ", asked).strip()}]
    for name in ("chosen", "rejected"):
        turn = entry.get(name)
        if isinstance(turn, list) and len(turn) == 1:
            turn = turn[0]
        if isinstance(turn, dict):
            kept[name] = _text(turn, "content" if "content" in turn else "value")
        else:
            kept[name] = _text({name: turn}, name)
        if not kept[name].strip():
            raise BadSampleError("empty_conversation", f"{name} is empty")
    return kept


def read_videochat2(entry: dict[str, Any]) -> dict[str, Any]:
    """Reads VideoChat2-IT: `QA` holds instruction `i`, question `q` (not in captions), answer `a`.

    The first instruction goes before the first question. VideoChat2 writes it once, before the
    video, and its query reads both. `start` and `end` give the part of the video in seconds.
    """
    pairs = entry["QA"]
    if not isinstance(pairs, list) or not pairs:
        raise BadSampleError("empty_conversation", "no pair in QA")
    turns = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise BadSampleError("bad_field", f"QA {number} is not an object")
        question, answer = _text(pair, "q", ""), _text(pair, "a")
        instruction = _text(pair, "i", "") if number == 0 or not question.strip() else ""
        asked = "\n".join(part for part in (instruction.strip(), question.strip()) if part)
        if number and not asked:
            raise BadSampleError("missing_field", f"q of QA {number}")
        slot = "" if number else _slot(entry)
        turns += [{"from": "human", "value": slot + asked}, {"from": "gpt", "value": answer}]
    kept = {name: value for name, value in entry.items() if name != "QA"}
    return {**kept, "conversations": turns}


#: Readers of whole formats, each under a field that only its format has. A reader gets an entry and
#: returns it with `conversations`, and `image` or `video`, in place of the fields that it has read.
READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"QA": read_videochat2}


def with_answers(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a pair once with each answer as the last turn, and any other entry unchanged."""
    if "chosen" not in entry:
        yield entry
        return
    asked = entry.get("conversations")
    for name in ("chosen", "rejected"):
        answer = {"from": "gpt", "value": entry.get(name)}
        yield {"conversations": [*(asked if isinstance(asked, list) else []), answer]}


def _slots_of(entry: dict[str, Any]) -> list[str]:
    """Returns the slot word of each visual: `image` or `video`."""
    slots = []
    for word in _VISUALS:
        value = entry.get(word) or []
        slots += [word] * (len(value) if isinstance(value, list) else 1)
    return slots


def _slot(entry: dict[str, Any]) -> str:
    """Returns the slots for an entry without slots in its text: one per visual."""
    return "".join(f"<{word}>\n" for word in _slots_of(entry))


def _text(entry: dict[str, Any], name: str, missing: str | None = None) -> str:
    value = entry.get(name, missing)
    if value is None:
        raise BadSampleError("missing_field", name)
    if not isinstance(value, str):
        raise BadSampleError("bad_field", f"{name} is not a text")
    return value
