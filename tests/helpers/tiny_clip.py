"""A CLIP that trains in seconds, and batches of captions for it."""

import torch

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch, pad_rows
from tests.helpers.visuals import frames_of

#: The eps is large because AdamW would otherwise turn rounding errors of zero gradients into full
#: steps.
SMALL = [
    "experiment=clip_context",
    "scale=tiny",
    "model.encoder.image_size=32",
    "model.encoder.config.vision.patch_size=8",
    "model.encoder.config.vision.hidden_size=32",
    "model.encoder.config.vision.intermediate_size=192",
    "model.encoder.config.vision.num_attention_heads=2",
    "model.encoder.config.vision.num_hidden_layers=2",
    "model.encoder.config.text.hidden_size=32",
    "optim.optimizer.lr=2.0e-3",
    "+optim.optimizer.eps=3.0e-2",
]


def make_batch(numbers, counts=(1, 1, 3, 1), length=12, vocabulary=64, size=16):
    """Makes a batch with one row per number. Rows do not depend on each other.

    Args:
        counts: numbers of frames, used in turn.
    """
    rows, frames = [], []
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        words = torch.randint(2, vocabulary, (length - number % 4,), generator=rng).tolist()
        rows.append([0, *words, 1])
        shape = (counts[number % len(counts)], 3, size, size)
        frames.append(torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8))
    one = torch.ones(len(rows), 1, dtype=torch.long)
    return VideoBatch(
        input_ids=one * VISUAL_SLOT,
        attention_mask=one.bool(),
        labels=one * IGNORE_INDEX,
        **frames_of(torch.cat(frames), [len(visual) for visual in frames]),
        prompt_ids=pad_rows(rows, 1),
        prompt_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        keys=[f"s.tar/{number}" for number in numbers],
    )
