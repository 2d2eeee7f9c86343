"""Puts visual tokens in the place of the slots of a row."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch
from lightning_modules.tokens import Row, VisualTokens


class Spliced(NamedTuple):
    """One sample: words and visual tokens in reading order, without padding."""

    embeds: Float[Tensor, "l m"]
    labels: Int[Tensor, " l"]
    row: Row


def insert(
    batch: VideoBatch,
    words: Float[Tensor, "b l m"],
    visuals: Sequence[Sequence[VisualTokens]],
) -> list[Spliced]:
    """Returns each row with its slots replaced by visual tokens.

    A visual without a slot has no place in a row. It takes part in the first row with a weight of
    0, so that all weights get gradients (`distributed.blank`).

    Args:
        words: embeddings of all `input_ids`; those of slots and padding are not used.
        visuals: the pieces of each visual, in the order of the slots, row by row; then those of
            visuals without a slot.
    """
    lengths = batch.attention_mask.sum(dim=1).tolist()
    slots = (batch.input_ids == VISUAL_SLOT).nonzero().tolist()
    rest, spliced = iter(visuals), []
    for number, length in enumerate(lengths):
        parts, labels, row, start = [], [], [], 0
        for stop in [column for n, column in slots if n == number] + [length]:
            parts.append(words[number, start:stop])
            labels.append(batch.labels[number, start:stop])
            if stop > start:
                row.append(stop - start)
            for piece in next(rest) if stop < length else ():
                parts.append(piece.features.to(words.dtype))
                labels.append(batch.labels.new_full((len(piece),), IGNORE_INDEX))
                row.append(piece.layout)
            start = stop + 1
        spliced.append(Spliced(torch.cat(parts), torch.cat(labels), row))
    for piece in (piece for pieces in rest for piece in pieces):
        first = spliced[0]
        spliced[0] = first._replace(embeds=first.embeds + 0 * piece.features.sum())
    return spliced
