"""Reads the `question` field of a sample's JSON, for validation scores.

{"conversations": [...], "question": {"options": ["red", "blue"], "answer": "B"}}
{"conversations": [...], "question": {"answer": "no", "pair": "clip7", "hallucinated": true}}
{"conversations": [...], "question": {"answer": ["a bike", "a bicycle"]}}

The field holds facts only. `lightning_modules.metrics` decides how to score them.
"""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from datamodules.batch import Task
from datamodules.errors import BadSampleError
from datamodules.sample.conversation import ConversationEncoder, Turn, check_text

_FIELDS = {"answer", "options", "pair", "hallucinated", "category", "group"}


def read_task(entry: dict[str, Any], turns: Sequence[Turn]) -> Task | None:
    """Returns the task of an entry, or None if `question` is missing or not a mapping.

    Raises:
        BadSampleError: bad_question, bad_json (invalid Unicode).
    """
    facts = entry.get("question")
    if not isinstance(facts, dict):
        return None
    unknown = sorted(map(str, facts.keys() - _FIELDS))
    if unknown:
        raise BadSampleError("bad_question", f"unknown field {unknown[0]!r}")
    given = sum(turn.role == "assistant" and bool(turn.text.strip()) for turn in turns)
    if given != 1:
        raise BadSampleError(
            "bad_question", f"{given} answers in the conversation; a question needs exactly 1"
        )
    answers = _texts(facts, "answer")
    options = _texts(facts, "options") if "options" in facts else ()
    task = Task(answers, options, (), facts.get("pair", ""), facts.get("hallucinated", False))
    _check(task, facts)
    return task


def encode_task(task: Task, conversation: ConversationEncoder) -> Task:
    """Returns the task with the first LLM token of each option's letter.

    Raises:
        ValueError: two letters begin with the same token.
    """
    letters = ascii_uppercase[: len(task.options)]
    ids = tuple(map(conversation.first_token, letters))
    if len(set(ids)) < len(ids):
        again = next(n for n, i in enumerate(ids) if i in ids[:n])
        raise ValueError(
            f"the tokenizer begins the answers {letters[ids.index(ids[again])]} and "
            f"{letters[again]} with the same token {ids[again]}, so they cannot be told apart: "
            "take another data.conversation.tokenizer, or leave `options` out of `question`"
        )
    return task._replace(option_ids=ids)


def _texts(facts: dict[str, Any], name: str) -> tuple[str, ...]:
    value = facts.get(name)
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)
    if not good or not texts:
        raise BadSampleError("bad_question", f"{name} must be a text or a list of texts")
    for text in texts:
        check_text(text, f"{name} of question")
    return tuple(texts)


def _check(task: Task, facts: dict[str, Any]) -> None:
    if not isinstance(task.pair, str) or not isinstance(task.hallucinated, bool):
        raise BadSampleError(
            "bad_question", "pair must be a text, and hallucinated must be true or false"
        )
    check_text(task.pair, "pair of question")
    if task.options and task.pair:
        raise BadSampleError("bad_question", "give options or a pair, not both")
    if task.options:
        letters = ascii_uppercase[: len(task.options)]
        if len(task.options) not in range(2, len(ascii_uppercase) + 1):
            raise BadSampleError(
                "bad_question", f"{len(task.options)} options, but 2 to 26 are allowed"
            )
        if len(task.answers) != 1 or task.answers[0] not in tuple(letters):
            raise BadSampleError(
                "bad_question",
                f"answer {list(task.answers)} is not a letter from A to {letters[-1]}",
            )
    if bool(task.pair) != ("hallucinated" in facts):
        raise BadSampleError("bad_question", "pair and hallucinated must be given together")
    if task.pair and task.answers not in (("yes",), ("no",)):
        raise BadSampleError(
            "bad_question", f"answer {list(task.answers)} of a pair must be yes or no"
        )
