"""Makes one line of JSON for each sample of a validation: what was asked, said and right."""

from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.batch import VISUAL_SLOT, VideoBatch
from datamodules.common.digest import number
from lightning_modules.metrics.base import Answered, Score


def answer_lines(
    batch: VideoBatch, answered: Sequence[Answered], scores: Mapping[str, Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """Returns a line for each row of the batch, without the values of its scores.

    The fields of a line:

    - `key`: shard and sample. `category`, `group`: those of its `question`.
    - `prompt`: the question as the LLM reads it. `frames`: the number of frames of each visual.
    - `right`: the right answers; without a question, the answer of the conversation.
    - `options`: the texts of a multiple choice. `answer`: what the model said, or null.
    - `parsed`: what each score's parser read in it, by name of the score.
    - `log_prob`, `tokens`: log-probability of the right answer in nats, and its number of tokens.
    - `option_log_probs`: log-probability of each option's letter.
    """
    asked = batch.questions()
    prompts = [
        as_text(ids[mask].tolist(), tokenizer)
        for ids, mask in zip(asked.input_ids, asked.attention_mask, strict=True)
    ]
    frames = _frames_of_rows(batch)
    labels = batch.answers()
    lines = []
    for row, sample in enumerate(answered):
        task = sample.task
        asking = {name: score for name, score in scores.items() if score.asks(task)}
        longest = max((score.max_new_tokens for score in asking.values()), default=0)
        right = list(task.answers) if task else [tokenizer.decode(labels[row]).strip()]
        lines.append(
            {
                "key": sample.key,
                "category": task.category if task else "",
                "group": task.group if task else "",
                "prompt": prompts[row],
                "frames": frames[row],
                "right": right,
                "options": list(task.options) if task else [],
                "answer": sample.said(longest) if longest else None,
                "parsed": {n: s.parse(sample) for n, s in asking.items() if s.parser},
                "log_prob": sample.log_prob,
                "tokens": sample.tokens,
                "option_log_probs": list(sample.options),
            }
        )
    return lines


def with_values(
    lines: Sequence[dict[str, Any]], scores: Mapping[str, Score]
) -> list[dict[str, Any]]:
    """Returns the lines of distinct samples, sorted by key, each with its `values`.

    `values` has the term of each result, by name. A result is the mean of its terms.
    """
    distinct = {line["key"]: line for line in lines}
    found = []
    for key in sorted(distinct):
        values: dict[str, float] = {}
        for score in scores.values():
            values |= score.terms_by_sample.get(number(key), {})
        found.append({**distinct[key], "values": values})
    return found


def as_text(ids: list[int], tokenizer: Any) -> str:
    """Decodes a prompt as the LLM reads it, with `<visual>` in place of visuals."""
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == VISUAL_SLOT:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "<visual>".join(tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces)


def _frames_of_rows(batch: VideoBatch) -> list[list[int]]:
    counts = iter([shape[0] for shape in batch.shapes])
    slots = (batch.input_ids == VISUAL_SLOT).sum(1).tolist()
    return [[next(counts) for _ in range(slot)] for slot in slots]
