"""Converts turns of other programs into turns of shards, with the visuals that they contain.

{"role": "user", "content": "What is it?"}                         OpenAI, ms-swift, TRL
{"role": "user", "content": [{"type": "image", "image": "a.jpg"},  Qwen, OpenAI
                             {"type": "text", "text": "What is it?"}]}
{"human": "What is it?", "assistant": "A bike."}                   ms-swift
{"from": "human", "value": "<img>a.jpg</img> What is it?"}         Qwen-VL
"""

import re
from collections.abc import Sequence
from typing import Any

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.fields import is_file
from datamodules.shards.annotations.media import suffix_of
from datamodules.visuals.frames import is_video

_KINDS = ("image", "video")
# Sampling and resizing options of Qwen's processor. They are ignored: `data.frames` sets them.
_READING = {"detail", "fps", "nframes", "min_frames", "max_frames", "total_pixels"}
_READING |= {"min_pixels", "max_pixels", "resized_height", "resized_width"}
# A file name between tags. `<video>` alone is a slot; the text after it may quote HTML.
_TAGGED = re.compile(r"<(img|image|video)>[ \t]*([^<>\n]*?)[ \t]*</\1>")


def to_turns(messages: Any, where: str) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Returns turns with `from` and `value`, and the visuals in them by kind, in order.

    `where` is the field name for error messages.

    Raises:
        BadSampleError: empty_conversation, missing_field, bad_field.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSampleError("empty_conversation", f"no turn in {where}")
    visuals: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        here = f"{where} {number}"
        if not isinstance(message, dict):
            raise BadSampleError("bad_field", f"{here} is not an object")
        if "human" in message and "assistant" in message:
            turns += [{"from": "human", "value": _text(message["human"], f"human of {here}")}]
            turns += [{"from": "gpt", "value": _text(message["assistant"], f"assistant of {here}")}]
            continue
        role = message.get("from", message.get("role"))
        text = message.get("value", message.get("content"))
        if text is None:
            raise BadSampleError("missing_field", f"value or content of {here}")
        role = {"user": "human", "assistant": "gpt"}.get(str(role), role)
        if isinstance(text, list):
            if role == "gpt":
                _refuse_shown(text, here)
            text = "\n".join(_read_part(part, visuals, here) for part in text)
        turns.append({"from": role, "value": _text(text, here)})
    return turns, visuals


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadSampleError("bad_field", f"{where} is not a text")
    return value


def _refuse_shown(parts: Sequence[Any], where: str) -> None:
    """Refuses a visual in an answer: the model would be trained to write its slot as a word."""
    for part in parts:
        if isinstance(part, dict) and _kind_of(part) != "text":
            raise BadSampleError(
                "bad_field",
                f"a part of {where} has type {_kind_of(part)!r}: an answer must be text",
            )


def _kind_of(part: dict[str, Any]) -> str:
    return str(part.get("type") or next(iter(part), None))


def take_tags(turns: Sequence[Any], where: str) -> tuple[list[Any], dict[str, list[str]]]:
    """Replaces each file between tags by a slot. Returns the turns, and the files by kind.

    Raises:
        BadSampleError: bad_field (a file in an answer, a url).
    """
    visuals: dict[str, list[str]] = {kind: [] for kind in _KINDS}

    def slot(match: re.Match[str]) -> str:
        tag, name = match.groups()
        if not _names_file(name):
            return match.group()
        (name,) = file_names(name, f"<{tag}> of {where}")
        suffix = suffix_of(name)
        kind = "video" if (is_video(suffix) if suffix else tag == "video") else "image"
        visuals[kind].append(name)
        return f"<{kind}>"

    taken = []
    for number, turn in enumerate(turns):
        text = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(text, str) and turn.get("from") in ("gpt", "assistant"):
            for match in _TAGGED.finditer(text):
                if is_file(match[2]):
                    what = f"{match.group()} in the answer {where} {number}"
                    raise BadSampleError("bad_field", f"{what} is a visual: an answer must be text")
        elif isinstance(text, str):
            turn = {**turn, "value": _TAGGED.sub(slot, text)}
        taken.append(turn)
    return taken, visuals


def _names_file(text: str) -> bool:
    return is_file(text) or len(text.split()) == 1


def _read_part(part: Any, visuals: dict[str, list[str]], where: str) -> str:
    """Returns the text of one part of a message.

    A visual becomes a slot, and its file is added to `visuals`.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadSampleError("bad_field", f"a part of {where} is not an object")
    kind = _kind_of(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    plain = kind.removesuffix("_url")
    if plain not in _KINDS:
        raise BadSampleError(
            "bad_field", f"a part of {where} has type {kind!r}, but must be text, image or video"
        )
    unknown = part.keys() - {"type", plain, kind} - _READING
    if unknown:
        raise BadSampleError(
            "bad_field", f"{sorted(unknown)[0]!r} in a part of {where} is not read"
        )
    given = part.get(kind, part.get(plain))
    if given is not None:
        visuals[plain] += file_names(given, f"{kind} of {where}")
    return f"<{plain}>"


def file_names(value: Any, where: str) -> list[str]:
    """Returns the file names of a field: a name, an object with `path` or `url`, or a list of them.

    Raises:
        BadSampleError: bad_field.
    """
    values = value if isinstance(value, list) else [value]
    names = []
    for one in values:
        if isinstance(one, dict):
            one = next((one[key] for key in ("path", "url", "file") if one.get(key)), None)
        if isinstance(one, list):
            raise BadSampleError("bad_field", f"{where}: put the frames of a video into a folder")
        if not isinstance(one, str):
            raise BadSampleError(
                "bad_field", f"{where} must be a file name or a list of file names"
            )
        if one.startswith("data:"):
            raise BadSampleError("bad_field", f"{where} holds data: write it into a file")
        scheme, separator, path = one.partition("://")
        if separator and scheme != "file":
            raise BadSampleError("bad_field", f"{where} is a url: download {one}")
        names.append(path if separator else one)
    return names


def with_slots(turns: Sequence[dict[str, Any]], slots: Sequence[str]) -> list[dict[str, Any]]:
    """Puts the slots before the first question if no text has a slot, as ms-swift does."""
    asked = [turn["value"] for turn in turns if turn["from"] != "gpt"]
    if any(f"<{kind}>" in text for text in asked for kind in _KINDS) or any(
        _names_file(match[2]) for text in asked for match in _TAGGED.finditer(text)
    ):
        return list(turns)
    first = next((n for n, turn in enumerate(turns) if turn.get("from") == "human"), None)
    return [
        {**turn, "value": "".join(f"<{s}>\n" for s in slots) + turn["value"]}
        if n == first
        else turn
        for n, turn in enumerate(turns)
    ]
