"""Refuses entries with fields that shards cannot represent, and names the field.

Otherwise the model would train on a sample without its video, on the wrong part of it, or on an
answer that the authors excluded. No error would show this.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.media import suffix_of

# Words in field names, singular and in lower case.
_VISUAL = {"image", "img", "video", "vid", "visual", "frame", "picture", "pic", "photo", "clip"}
_VISUAL |= {"media"}
#: With one of these words, the field is a fact about a visual: `video_fps`, `media_type`.
_FACTS = {"type", "kind", "size", "fps", "rate", "width", "height", "duration", "length", "count"}
_FACTS |= {"num", "category", "token"}
_NO_PLURALS = {"s", "ms", "fps"}
_IDS = {"id", "source", "url"}
#: Suffixes of pictures and videos that cannot be read here.
_UNREAD = {"3gp", "asf", "divx", "f4v", "flv", "m2ts", "m2v", "mts", "ogm", "ogv", "rmvb", "vob"}
_UNREAD |= {"avif", "bmp", "heic", "heif", "jfif", "jp2", "jxl", "svg", "tif", "tiff", "wmv"}
_SHOWN = 60  # characters of a value in a message
#: Fields of a turn with which ms-swift and OpenAI exclude an answer from the loss.
_UNLEARNT = ("loss", "loss_scale", "weight")
_CONVERSATIONS = ("messages", "conversation", "conversations", "prompt", "completion")
_OF_TURNS = ("role", "from", "content", "value", "human", "assistant")


def words_of(name: str) -> list[str]:
    """Returns the words of a field name, singular and in lower case: `videoPaths`: video, path."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)
    words = [word.lower() for word in words]
    return [word if word in _NO_PLURALS else word.removesuffix("s") for word in words]


def refuse_visuals(
    entry: dict[str, Any], seen: bool, read: Collection[str], ignored: Collection[str]
) -> None:
    """Refuses a field that seems to name a visual: the sample would be trained without it.

    In an entry without visuals, two kinds of values are suspected: any text if the field name
    contains a word for a visual, such as `video_name`, and a file name under any other field name,
    except an id. In an entry with visuals, only file names are suspected, if the field name
    contains a word for a visual and is not an id: there `video_id` is a fact.

    Args:
        entry: the entry as published; extra fields of its turns are checked too.
        seen: whether the entry has a visual that is read.
        read: fields of the entry that are read; no extra field of a turn is read.
        ignored: fields to skip in this check.

    Raises:
        BadSampleError: bad_field.
    """
    for name, value in entry.items():
        if name in _CONVERSATIONS:
            for number, turn in enumerate(_turns(value)):
                own = {field: turn[field] for field in turn if field not in _OF_TURNS}
                _refuse_fields(own, seen, ignored, f" of {name} {number}")
        elif name not in read:
            _refuse_fields({name: value}, seen, ignored)


def _refuse_fields(
    fields: dict[str, Any], seen: bool, ignored: Collection[str], where: str = ""
) -> None:
    for name, value in fields.items():
        words = words_of(name)
        looks = not _VISUAL.isdisjoint(words)
        an_id = bool(words) and words[-1] in ({"id"} if looks else _IDS)
        if name in ignored or (not looks and (seen or an_id)) or (seen and an_id):
            continue
        # The value of `media_type` may be any text, but not a file or a url.
        bare = looks and not seen and _FACTS.isdisjoint(words)
        texts = list(_texts(value))
        suspected = [text for text in texts if is_file(text)]
        if looks and not seen:
            suspected += [text for text in texts if bare or _is_data(text)]
        if suspected:
            shown = suspected[0].splitlines()[0]
            shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
            raise BadSampleError(
                "bad_field",
                f"{name!r}{where} names {shown}, but this field is not read: name the file under "
                f"image or video of the entry, or add --ignore-field {name}",
            )


def _turns(value: Any) -> list[dict[str, Any]]:
    turns = value if isinstance(value, list) else []
    return [turn if isinstance(turn, dict) else {} for turn in turns]


def is_file(text: str) -> bool:
    """Returns True if a text is a picture or video file name, also of unsupported formats."""
    stem, dot, ending = text.rpartition("/")[2].rpartition(".")
    unread = bool(stem and dot) and ending.lower() in _UNREAD and len(text.split()) == 1
    return (unread or bool(suffix_of(text))) and "\n" not in text and "://" not in text


def _is_data(text: str) -> bool:
    return text.startswith(("http", "data:", "s3:"))


def _texts(value: Any, depth: int = 3) -> Iterator[str]:
    """Yields the texts in a value that are not empty."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, list | dict) and depth:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one, depth - 1)


def refuse_unlearnt(entry: dict[str, Any], ignored: Collection[str]) -> None:
    """Refuses answers that are marked as excluded from the loss, because shards have no such mark.

    Raises:
        BadSampleError: bad_field.
    """
    for name in ("kto_tag", "label"):  # kto_tag: LLaMA-Factory; label: ms-swift and TRL
        if entry.get(name) is False and name not in ignored:
            what = "marks a bad answer, which the model would learn"
            remedy = "leave the entry out, or pair it with a good one as chosen and rejected"
            raise BadSampleError(
                "bad_field", f"{name!r} is false and {what}: {remedy}, or add --ignore-field {name}"
            )
    for field in _CONVERSATIONS:
        for number, turn in enumerate(_turns(entry.get(field))):
            if turn.get("role", turn.get("from")) not in ("assistant", "gpt"):
                continue
            for name in _UNLEARNT:
                # In Python, True == 1 and False == 0.
                if turn.get(name) in (None, 1) or name in ignored:
                    continue
                where = f"{name!r} of {field} {number} is {turn[name]!r}"
                raise BadSampleError(
                    "bad_field",
                    f"{where}, but the model learns every answer alike: leave such turns out, or "
                    f"add --ignore-field {name}",
                )
