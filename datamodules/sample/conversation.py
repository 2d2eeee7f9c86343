"""Encodes turns into ids, labels and visual slots, and the question into the pooler's guide prompt.

[{"from": "human", "value": "<video>\\nWhat is it?"}, {"from": "gpt", "value": "A bike."}]

      chat template of the tokenizer
input_ids  <|user|> SLOT \\n W h a t ... <|assistant|> A  bike . <|end|>
labels        -      -   -  - - - -  -        -       A  bike . <|end|>
prompt_ids <|start|> What is it? <|end|>
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.errors import BadSampleError
from datamodules.file_names import natural_key
from datamodules.sample.outline import Outline
from datamodules.sample.tokenizer import default_template, load_tokenizer, starting_ids
from datamodules.visuals.frames import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_video

VISUALS = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SLOT_WORD = re.compile(r"<(image|video)>")
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
CLIP_CONTEXT = 77
_MAX_JSON = 16 << 20  # bytes of a conversation; no usable text is longer
_SLOT_MARK = "\ue000"  # placeholder of a visual in rendered templates; private use in Unicode


class Turn(NamedTuple):
    role: str  # user, assistant or system
    text: str  # with the word <image> or <video> in the place of each visual


@dataclass
class EncodedConversation:
    input_ids: list[int]  # one VISUAL_SLOT per visual
    labels: list[int]
    prompt_ids: list[int]


def read_turns(entry: Any) -> list[Turn]:
    """Returns the turns of a LLaVA entry, or of a caption entry `{"caption": "..."}`.

    Raises:
        BadSampleError: missing_field, empty_conversation, unknown_role, bad_json (invalid
            Unicode).
    """
    conversations = entry.get("conversations") if isinstance(entry, dict) else None
    if conversations is None and isinstance(entry, dict) and "caption" in entry:
        answer = {"from": "gpt", "value": entry["caption"]}
        conversations = [{"from": "human", "value": "<image>"}, answer]
    if conversations is None:
        raise BadSampleError("missing_field", "conversations")
    if not isinstance(conversations, list) or not conversations:
        raise BadSampleError("empty_conversation", "no turn")
    turns = []
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadSampleError("missing_field", f"value of turn {number}")
        check_text(turn["value"], f"turn {number}")
        role = _ROLES.get(str(turn.get("from")))
        if role is None:
            raise BadSampleError("unknown_role", f"{turn.get('from')!r} in turn {number}")
        turns.append(Turn(role, turn["value"].replace(_SLOT_MARK, "")))
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise BadSampleError("empty_conversation", "no answer")
    return turns


def check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        raise BadSampleError("bad_json", f"{where} is not Unicode: {error.reason}") from None


def parse_sample(raw: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """Returns the turns of a raw sample, and its visuals' suffixes in the order of the slots.

    Raises:
        BadSampleError: as `read_entry`, `read_turns` and `match_slots`.
    """
    return parse_entry(read_entry(raw), raw)


def parse_entry(entry: Any, raw: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    """Does the work of `parse_sample` when the sample's JSON is already parsed as `entry`.

    Raises:
        BadSampleError: as `read_turns` and `match_slots`.
    """
    turns = read_turns(entry)
    return turns, match_visuals(turns, raw)


def read_entry(raw: dict[str, Any]) -> Any:
    """Returns the parsed `.json` of a raw sample.

    Raises:
        BadSampleError: missing_field, bad_json, too_long.
    """
    if "json" not in raw:
        raise BadSampleError("missing_field", f"the sample has no .json, but {_found(raw)}")
    if len(raw["json"]) > _MAX_JSON:
        raise BadSampleError(
            "too_long", f"{len(raw['json'])} bytes of JSON, the limit is {_MAX_JSON}"
        )
    try:
        return json.loads(raw["json"])
    except (ValueError, RecursionError) as error:
        raise BadSampleError("bad_json", str(error)) from None


def match_visuals(turns: Sequence[Turn], raw: dict[str, Any]) -> list[str]:
    """Returns the suffixes of a raw sample's visuals, in the order of their slots in the text.

    Raises:
        BadSampleError: as `match_slots`.
    """
    suffixes = [suffix for suffix in raw if suffix.rpartition(".")[2] in VISUALS]
    try:
        return match_slots(turns, sorted(suffixes, key=natural_key))
    except BadSampleError as error:
        found = _found(raw)
        raise BadSampleError(error.reason, f"{error.detail}; the sample has {found}") from None


def _found(raw: dict[str, Any]) -> str:
    """Returns a list of the sample's members for messages, with the likely cause of wrong ones."""
    suffixes = [suffix for suffix in raw if not suffix.startswith("__")]
    shown = ", ".join(f".{suffix}" for suffix in suffixes[:6])
    shown += f" and {len(suffixes) - 6} more" if suffixes[6:] else ""
    if "json" not in raw and any(suffix.endswith(".json") for suffix in suffixes):
        return f"{shown}: a key ends at its first dot, so a key must not contain a dot"
    if "json" not in raw or suffixes == ["json"]:
        return (
            f"only {shown}: the members of a sample must stand together, as tar --sort=name packs "
            "them"
        )
    return shown


def match_slots(turns: Sequence[Turn], names: Sequence[str]) -> list[str]:
    """Sorts the visuals into the order of their slots in the text.

    `<video>` takes the next video, and `<image>` the next image. If the sample has no image,
    `<image>` takes the next video, as in LLaVA-Video's own data.

    Raises:
        BadSampleError: slot_mismatch, not_a_video.
    """
    videos = [name for name in names if is_video(name)]
    images = [name for name in names if not is_video(name)]
    slots = [word for turn in turns if turn.role != "assistant" for word in _slots(turn.text)]
    if len(slots) != len(names):
        raise BadSampleError(
            "slot_mismatch", f"{len(slots)} slots in the text, but {len(names)} visuals"
        )
    queues = {"video": iter(videos), "image": iter(images or videos)}
    matched = [next(queues[word], None) for word in slots]
    if None in matched:
        if slots.count("video") > len(videos):
            raise BadSampleError(
                "not_a_video", f"{len(videos)} videos for {slots.count('video')} slots <video>"
            )
        raise BadSampleError("slot_mismatch", f"{slots} in the text, but {list(names)} given")
    return [name for name in matched if name is not None]


def _slots(text: str) -> list[str]:
    return _SLOT_WORD.findall(text)


class ConversationEncoder:
    """Encodes turns for an LLM and for the text tower of an encoder.

    Args:
        tokenizer: tokenizer of the LLM: hub id, folder, `.gguf` file, or `None` for the built-in
            one.
        prompt_tokenizer: tokenizer of the encoder's text tower, given in the same way.
        max_length: maximum tokens of a sample; a visual counts as one. A last answer that is too
            long is cut. A sample is refused if a visual or all labels would be lost.
        max_prompt_length: maximum tokens for the text tower; a longer question is cut at the end.
            `None` means 77, as in CLIP.
        prompt_with_answers: if true, the guide prompt is the whole conversation, as in PPLLaVA's
            training code; if false, only the questions, as at test time.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        prompt_tokenizer: str | None = None,
        max_length: int = 2048,
        max_prompt_length: int | None = None,
        prompt_with_answers: bool = False,
    ):
        self.tokenizer = load_tokenizer(tokenizer)
        self.prompt_tokenizer = load_tokenizer(prompt_tokenizer)
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length or CLIP_CONTEXT
        self.prompt_with_answers = prompt_with_answers
        self._first_tokens: dict[str, int] = {}
        # Text is tokenized separately from the <s> before it. In one call, Llama's newer tokenizers
        # drop the space that `tokenizer(text)` puts before the first word.
        own = self.tokenizer.chat_template == default_template(self.tokenizer)
        self._start_ids = starting_ids(self.tokenizer) if own else []
        self._start = "".join(self.tokenizer.convert_ids_to_tokens(self._start_ids))

    def first_token(self, answer: str) -> int:
        """Returns the first token of an answer that follows a question in the chat template."""
        if answer not in self._first_tokens:
            labels = self([Turn("user", "?"), Turn("assistant", answer)]).labels
            self._first_tokens[answer] = next(i for i in labels if i != IGNORE_INDEX)
        return self._first_tokens[answer]

    def __call__(
        self, turns: Sequence[Turn], prompt_with_answers: bool | None = None
    ) -> EncodedConversation:
        """Returns ids, with labels on each answer and its end token.

        `prompt_with_answers` overrides the encoder's own setting for this sample.

        Raises:
            BadSampleError: too_long, chat_template (the template refuses these turns).
        """
        if len(turns) > self.max_length:  # a turn needs at least one token
            raise BadSampleError(
                "too_long", f"{len(turns)} turns do not fit in {self.max_length} tokens"
            )
        text, answers = self._render(turns)
        input_ids, labels = self._tokenize(text, answers)
        if len(input_ids) > self.max_length:
            kept = labels[: self.max_length]
            learnt = [label for label in kept if label != IGNORE_INDEX]
            if VISUAL_SLOT in input_ids[self.max_length :] or not learnt:
                raise BadSampleError(
                    "too_long", f"{len(input_ids)} tokens, the limit is {self.max_length}"
                )
            input_ids, labels = input_ids[: self.max_length], kept
        return EncodedConversation(input_ids, labels, self.prompt(turns, prompt_with_answers))

    def ask(self, turns: Sequence[Turn]) -> EncodedConversation:
        """Returns ids up to the start of the next answer, without labels.

        Raises:
            BadSampleError: too_long, chat_template.
        """
        try:
            text, _ = self._apply(self._messages(turns), ask=True)
        except TemplateError as error:
            raise BadSampleError("chat_template", str(error)) from None
        input_ids, labels = self._tokenize(text, [])
        if len(input_ids) > self.max_length:
            raise BadSampleError(
                "too_long", f"{len(input_ids)} tokens, the limit is {self.max_length}"
            )
        return EncodedConversation(input_ids, labels, self.prompt(turns))

    def outlined(self, outline: Outline) -> EncodedConversation:
        """Returns a text of this size and a guide prompt of the maximum length."""
        prompt = [1] * self.max_prompt_length
        return EncodedConversation(outline.input_ids, outline.labels, prompt)

    @staticmethod
    def count_slots(turn: Turn) -> int:
        """Returns the number of visual slots in a turn. An answer has none."""
        return 0 if turn.role == "assistant" else len(_slots(turn.text))

    def prompt(self, turns: Sequence[Turn], with_answers: bool | None = None) -> list[int]:
        """Returns the ids of the pooler's guide prompt, with the text tower's special tokens."""
        everything = self.prompt_with_answers if with_answers is None else with_answers
        asked = [t for t in turns if t.role == "user" or everything]
        text = " ".join(" ".join(_SLOT_WORD.sub(" ", turn.text) for turn in asked).split())
        encoded = self.prompt_tokenizer(text, truncation=True, max_length=self.max_prompt_length)
        return list(encoded["input_ids"])

    def _render(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of the whole conversation and the character spans of the answers."""
        messages = self._messages(turns)
        marked = _GENERATION_MARK.search(self._template) is not None
        try:
            text, spans = self._apply(messages, marks=marked)
            return text, self._spoken(text, spans) if marked else self._find_answers(text, messages)
        except TemplateError as error:
            raise BadSampleError("chat_template", str(error)) from None

    @staticmethod
    def _messages(turns: Sequence[Turn]) -> list[dict]:
        return [
            {"role": turn.role, "content": turn.text}
            if turn.role == "assistant"
            else {"role": turn.role, "content": _SLOT_WORD.sub(_SLOT_MARK, turn.text)}
            for turn in turns
        ]

    @property
    def _template(self) -> str:
        return self.tokenizer.get_chat_template()

    def _apply(
        self, messages: list[dict], *, marks: bool = False, ask: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        tokens = dict[str, Any](self.tokenizer.special_tokens_map)
        rendered, spans = render_jinja_template(
            [messages],
            chat_template=self._template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=ask,
            **tokens,
        )
        return rendered[0], [(int(start), int(end)) for start, end in spans[0]] if marks else []

    def _spoken(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Returns the spans that contain text. Empty answers get no labels."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = re.compile("|".join(re.escape(str(t)) for t in added if t.special) or "(?!)")
        return [(start, end) for start, end in spans if special.sub("", text[start:end]).strip()]

    def _find_answers(self, text: str, messages: list[dict]) -> list[tuple[int, int]]:
        """Finds the answer spans for a template without generation marks.

        Renders the turns before each answer to find where the answer starts.
        """
        specials = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        end_of_turn = re.compile(r"\s*(?:" + "|".join(map(re.escape, specials)) + ")")
        spans = []
        for number, message in enumerate(messages):
            answer = message["content"].strip()
            if message["role"] != "assistant" or not answer:
                continue
            before = self._apply(messages[:number], ask=True)[0] if number else ""
            start = text.find(answer, len(before)) if text.startswith(before) else -1
            if start < 0:
                raise ValueError(
                    "the chat template does not write a conversation turn by turn; give one that "
                    "marks its answers with {% generation %}"
                )
            end = start + len(answer)
            ends = end_of_turn.match(text, end) if specials else None
            spans.append((start, ends.end() if ends else end))
        return spans

    def _tokenize(
        self, text: str, answers: Iterable[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Tokenizes text with slot marks into ids and labels.

        Labels the tokens that overlap an answer.
        """
        learnt = bytearray(len(text) + 1)
        for start, end in answers:
            learnt[start:end] = b"\1" * (end - start)
        input_ids: list[int] = []
        labels: list[int] = []
        at = 0
        if self._start_ids and text.startswith(self._start):
            input_ids += self._start_ids
            labels += [IGNORE_INDEX] * len(self._start_ids)
            at, text = len(self._start), text[len(self._start) :]
        for number, piece in enumerate(text.split(_SLOT_MARK)):
            if number:
                input_ids.append(VISUAL_SLOT)
                labels.append(IGNORE_INDEX)
                at += len(_SLOT_MARK)
            if piece:
                ids, marks = self._tokenize_piece(piece, learnt[at : at + len(piece)])
                input_ids += ids
                labels += [i if mark else IGNORE_INDEX for i, mark in zip(ids, marks, strict=True)]
            at += len(piece)
        return input_ids, labels

    def _tokenize_piece(self, text: str, learnt: bytearray) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        marks = [any(learnt[start:end]) for start, end in encoded["offset_mapping"]]
        return ids, marks
