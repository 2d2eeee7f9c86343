"""Computes the model's answers to the samples of a validation batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule

from datamodules.batch import IGNORE_INDEX, Task, VideoBatch
from lightning_modules.distributed.sharding import whole_outside_of_blocks
from lightning_modules.loss import sequence_log_probs
from lightning_modules.metrics.base import Answered, Score
from lightning_modules.model import Output, VideoLanguageModel

#: Greedy decoding. It overrides the generation config of the LLM, which would change scores;
#: Qwen2's, for example, has a repetition penalty.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


def read_answers(
    network: VideoLanguageModel,
    batch: VideoBatch,
    output: Output,
    scores: Sequence[Score],
    tokenizer: Callable[[], Any],
) -> list[Answered]:
    """Returns the answers that `scores` need, one for every row of the batch.

    `output` is the result of `network(batch)`. The token before an answer does not attend to it, so
    the same forward pass gives the likelihood of each option's letter. Text is generated only for
    rows whose text a score needs, with the largest `max_new_tokens` of these scores. `tokenizer` is
    called only then.
    """
    with torch.no_grad(), whole_outside_of_blocks(network):
        head = network.llm.head
        sums, counts = sequence_log_probs(output.hidden, output.inputs.labels, head)
        options = option_log_probs(output.hidden, output.inputs.labels, batch.tasks, head)
    lengths = [
        max((score.max_new_tokens for score in scores if score.asks(task)), default=0)
        for task in batch.tasks
    ]
    said = generate_answers(network, batch, lengths, tokenizer)
    columns = (batch.keys, batch.tasks, sums.tolist(), counts.tolist(), options, said)
    return [Answered(*sample) for sample in zip(*columns, strict=True)]


def option_log_probs(
    hidden: Float[Tensor, "b l m"],
    labels: Int[Tensor, "b l"],
    tasks: Sequence[Task | None],
    head: Callable[[Tensor], Tensor],
) -> list[tuple[float, ...]]:
    """Returns, for each row, the log-probabilities of the option letters at the answer's start."""
    rows = [row for row, task in enumerate(tasks) if task and task.options]
    found: list[tuple[float, ...]] = [()] * len(tasks)
    if not rows:
        return found
    first = (labels[rows] != IGNORE_INDEX).int().argmax(dim=1)  # of the answer
    logits = head(hidden[rows, first - 1])  # rows, vocabulary
    for row, log_probs in zip(rows, logits.float().log_softmax(-1), strict=True):
        task = tasks[row]
        assert task is not None
        found[row] = tuple(log_probs[list(task.option_ids)].tolist())
    return found


def generate_answers(
    network: VideoLanguageModel,
    batch: VideoBatch,
    lengths: Sequence[int],
    tokenizer: Callable[[], Any],
) -> list[Callable[[int], str]]:
    """Returns, for each row, a function: N -> text of the first N generated tokens.

    Rows with length 0 are not generated. Ranks with sharded weights must generate together, so a
    rank without questions generates for its first row and drops the result.
    """
    said: list[Callable[[int], str]] = [_nothing] * len(lengths)
    rows = [row for row, length in enumerate(lengths) if length]
    sharded = isinstance(network, FSDPModule)
    if not (_any_rank(rows, batch.input_ids.device) if sharded else rows):
        return said
    words = tokenizer()
    ids = network.generate(
        batch.select(rows or [0]).questions(),
        max_new_tokens=max(max(lengths), 1),
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **GREEDY,
    )
    for row, generated in zip(rows, ids.tolist(), strict=False):
        said[row] = partial(_decode, words, generated)
    return said


def _any_rank(rows: Sequence[int], device: torch.device) -> bool:
    flag = torch.tensor(len(rows), dtype=torch.int32, device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)


def _decode(tokenizer: Any, ids: list[int], count: int) -> str:
    return tokenizer.decode(ids[:count], skip_special_tokens=True).strip()


def _nothing(count: int) -> str:
    return ""
