"""Makes eight samples with answers of very unequal length, and optimizer steps over them.

The reference for a step is plain autograd: one sample at a time, with the loss written by hand.
"""

from dataclasses import dataclass

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from datamodules.batch import (
    IGNORE_INDEX,
    VISUAL_SLOT,
    PreferenceBatch,
    VideoBatch,
    data_rank,
    pad_rows,
)
from tests.helpers.visuals import frames_of

#: Number of labelled tokens of each sample.
LABELS = (2, 2, 2, 107, 2, 2, 2, 107)


def make_rows(numbers, seed=0):
    """Makes a batch with one row per number, some with a video. Rows are independent."""
    rows, labels, frames, counts = [], [], [], []
    for number in numbers:
        rng = torch.Generator().manual_seed(100 + number)
        question = torch.randint(2, 2000, (6,), generator=rng).tolist()
        if number % 3 != 1:
            question[2] = VISUAL_SLOT
            counts.append(1 + number % 3)
            shape = (counts[-1], 3, 32, 32)
            frames.append(torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8))
        rng = torch.Generator().manual_seed(1000 * seed + number)
        answer = torch.randint(2, 2000, (LABELS[number % 8],), generator=rng).tolist()
        rows.append([*question, *answer])
        labels.append([IGNORE_INDEX] * 6 + answer)
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    prompts = torch.tensor([[5 + number, 6, 7, 1] for number in numbers])
    return VideoBatch(
        input_ids=pad_rows(rows, 0),
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        labels=pad_rows(labels, IGNORE_INDEX),
        **frames_of(torch.cat([none, *frames]), counts),
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        keys=[f"s.tar/{number}" for number in numbers],
    )


def make_pairs(numbers):
    """Makes a batch of two answers to each question, with reference log-probabilities."""
    chosen, rejected = make_rows(numbers), make_rows(numbers, seed=1)
    rejected.pixels = chosen.pixels
    reference = torch.tensor([[-900.0 - number, -880.0] for number in numbers])
    return PreferenceBatch(chosen, rejected, reference, [{}] * len(numbers))


def loss_by_hand(network, batch):
    """Returns (summed cross-entropy, number of labels) of one row, computed in a loop."""
    output = network(batch)
    (labels,) = output.inputs.labels
    table = network.llm.head(output.hidden)[0].float().log_softmax(-1)
    learnt = [n for n in range(len(labels)) if labels[n] != IGNORE_INDEX]
    return -sum(table[n - 1, labels[n]] for n in learnt), len(learnt)


@dataclass
class Layout:
    """A division of the samples of optimizer steps into micro-batches.

    Attributes:
        steps: sample numbers of each micro-batch of each step.
        accumulation: micro-batches per step, except in a short step.
    """

    steps: list[list[list[int]]]
    accumulation: int

    def share(self, rank: int, ranks: int) -> list[list[int]]:
        micro_batches = [numbers for step in self.steps for numbers in step]
        return micro_batches[rank::ranks]


EIGHT = list(range(8))
LAYOUTS = {
    "1x8": Layout([[EIGHT]], 1),
    "4x2": Layout([[EIGHT[n : n + 2] for n in range(0, 8, 2)]], 4),
    "8x1": Layout([[[n] for n in EIGHT]], 8),
    "budget": Layout([[[0, 1, 2], [3], [4, 5, 6], [7]]], 4),
    "short": Layout([[[0], [1], [2], [3]], [[4, 5, 6], [7]]], 4),
}


class Loader:
    def __init__(self, shares, make):
        self._shares, self._make = shares, make

    def __len__(self):
        return len(self._shares)

    def __iter__(self):
        return map(self._make, self._shares)


class Samples(LightningDataModule):
    """Data with the steps of a layout, and a validation on the eight samples in batches of `val`.

    If the ranks do not divide the number of validation batches, the first batches are repeated.
    """

    def __init__(self, layout, make, val=8):
        super().__init__()
        self._layout, self._make = layout, make
        self._val = [EIGHT[n : n + val] for n in range(0, 8, val)]

    def train_dataloader(self):
        return Loader(self._layout.share(*data_rank(self.trainer)), self._make)

    def val_dataloader(self):
        (rank, ranks), count = data_rank(self.trainer), len(self._val)
        turns = range(rank, -(-count // ranks) * ranks, ranks)
        return Loader([self._val[turn % count] for turn in turns], self._make)


class Gradients(Callback):
    """Records the gradients that the optimizer gets in each step, and the logged metrics."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module: LightningModule, optimizer):
        self.steps.append(
            {
                name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
                for name, p in pl_module.named_parameters()
                if p.grad is not None
            }
        )

    def on_train_batch_end(self, trainer: Trainer, *_):
        if trainer.global_step > len(self.logged):
            self.logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def pair_by_hand(network, batch, name, beta, gamma):
    """Returns the loss of one pair, plus `gamma` times the chosen answer's mean cross-entropy."""
    (chosen, learnt), (rejected, others) = (
        loss_by_hand(network, answer) for answer in (batch.chosen, batch.rejected)
    )
    ((kept, left),) = batch.reference.tolist()
    if name == "ipo":  # on means over tokens
        margin = (-chosen - kept) / learnt - (-rejected - left) / others
        loss = (margin - 1 / (2 * beta)) ** 2
    else:
        margin = (-chosen - kept) - (-rejected - left)
        hinge = torch.clamp(1 - beta * margin, min=0)
        loss = -torch.log(torch.sigmoid(beta * margin)) if name == "sigmoid" else hinge
    return loss + gamma * chosen / learnt
