"""Benchmarks the loss of labelled tokens alone, against the logits of every token.

Measures forward and backward of one row of 1,024 tokens with an answer of 64 tokens, typical of an
instruction about a short video. The vocabularies are those of Vicuna and Qwen2. The width is
smaller than theirs, which only makes the head cheaper, and both ways need the head.
"""

import torch
from harness import Row, at_most, compare, peak_memory, table
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX
from lightning_modules.loss import sequence_log_probs

TOKENS, ANSWER, WIDTH = 1024, 64, 512


def full_logits_loss(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Returns the loss as transformers computes it: float32 logits of all tokens, then the mask."""
    logits = head(hidden).float()[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def measure(vocabulary: int) -> list[Row]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, vocabulary, bias=False)
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    labels = torch.full((1, TOKENS), IGNORE_INDEX)
    labels[:, -ANSWER:] = torch.randint(vocabulary, (1, ANSWER))

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight])]

    def ours() -> list[Tensor]:
        return gradients(-sequence_log_probs(hidden, labels, head)[0].sum() / ANSWER)

    def baseline() -> list[Tensor]:
        return gradients(full_logits_loss(hidden, labels, head))

    name = f"loss, vocabulary {vocabulary:,}"
    speed = compare(name, ours, baseline, at_least=4)
    memory = [peak_memory(way) / 2**20 for way in (ours, baseline)]
    return [speed, at_most(f"{name}, peak memory", *memory, share=0.5, unit="MiB")]


def run() -> list[Row]:
    return [*measure(32_000), *measure(152_064)]


if __name__ == "__main__":
    print(table(run()))
