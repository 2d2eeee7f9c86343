"""A prefix cache: the LLM reads the common beginning of consecutive rows only once."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from datamodules.batch import IGNORE_INDEX
from lightning_modules.model import LanguageInputs, VideoLanguageModel

#: Tokens that the LLM reads at a time. More of them only take more memory.
CHUNK_TOKENS = 8192

#: Tokens of two inputs that are compared at a time.
_COMPARED = 4096


class PrefixCache:
    """A KV cache of the prefix that consecutive calls share.

    The haystacks of a needle test are equal up to the needle. The part before it is read once for
    all needles, and the next depth continues from there. Two rows share the tokens whose embeddings
    and positions are equal. So this works for every pooler and rotary scheme; if nothing is equal,
    nothing is shared.

    A row alone is read on the cache itself, and what differs in the next row is cropped away. So
    memory holds the cache once. Several rows are read on copies of it.

    Args:
        chunk_tokens: tokens of each row that the LLM reads at a time.

    Attributes:
        computed: tokens that went through the LLM.
        recomputed: tokens that would go through the LLM without sharing.
    """

    def __init__(self, model: VideoLanguageModel, chunk_tokens: int = CHUNK_TOKENS):
        self._llm, self._chunk = model.llm, chunk_tokens
        self._cache: Cache = DynamicCache()
        self._embeds: Float[Tensor, "l m"] | None = None
        self._positions: Float[Tensor, "a1 l"] | None = None
        self.computed = self.recomputed = 0

    @torch.no_grad()
    def hidden(self, inputs: LanguageInputs, first: int) -> Float[Tensor, "b k m"]:
        """Returns the hidden states of each row from token `first` on.

        Rows are padded on the right.
        """
        llm: Any = self._llm
        rotary = llm.decoder.rotary_emb
        if not rotary.depends_on_length:
            return self._hidden(inputs, first)
        # Another length turns the same prefix by other angles, so rows share nothing.
        self._cache, self._embeds = DynamicCache(), None
        rotary.whole_row = inputs.positions
        try:
            return self._hidden(inputs, first)
        finally:
            rotary.whole_row = None

    def _hidden(self, inputs: LanguageInputs, first: int) -> Float[Tensor, "b k m"]:
        tokens, rows = int(inputs.mask.sum()), len(inputs.mask)
        self.recomputed += tokens
        if rows == 1:
            kept = self._keep(inputs, first)
            self._store(inputs, inputs.mask.shape[1])
            self.computed += tokens - kept
            return self._read(inputs, self._cache, kept, first)

        shared = min(self._alike(inputs), first)
        kept = self._keep(inputs, shared)
        self._store(inputs, shared)
        for part in _chunks(kept, shared, self._chunk):
            embeds, positions = inputs.embeds[:1, part], inputs.positions[:, :1, part]
            self._llm(embeds, None, positions, self._cache)
        cache: Cache = deepcopy(self._cache) if shared else DynamicCache()
        if shared:
            cache.batch_repeat_interleave(rows)
        self.computed += shared - kept + tokens - rows * shared
        return self._read(inputs, cache, shared, first)

    def cached_bytes(self) -> int:
        """Returns the size of the keys and values of all layers."""
        layers: list[Any] = self._cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def _read(
        self, inputs: LanguageInputs, cache: Cache, start: int, first: int
    ) -> Float[Tensor, "b k m"]:
        """Reads the rows from token `start` on, and returns the states from token `first` on."""
        states = []
        for part in _chunks(start, inputs.mask.shape[1], self._chunk):
            mask = inputs.mask[:, : part.stop] if len(inputs.mask) > 1 else None
            hidden = self._llm(inputs.embeds[:, part], mask, inputs.positions[..., part], cache)
            if part.stop > first:
                states.append(hidden[:, max(0, first - part.start) :])
        return torch.cat(states, dim=1)

    def _alike(self, inputs: LanguageInputs) -> int:
        """Returns the number of tokens from the left that are equal in all rows."""
        embeds, positions = inputs.embeds, inputs.positions
        return _agreement(embeds[:1], embeds, positions[:, :1], positions)

    def _keep(self, inputs: LanguageInputs, most: int) -> int:
        """Crops the cache to what the first row begins with, at most `most`; returns its length."""
        if self._embeds is None or self._positions is None:
            return 0
        length = len(self._embeds)
        known = min(most, length)
        kept = _agreement(
            self._embeds[None, :known],
            inputs.embeds[:1, :known],
            self._positions[:, None, :known],
            inputs.positions[:, :1, :known],
        )
        if surplus := length - kept:
            self._cache.crop(-surplus)
        return kept

    def _store(self, inputs: LanguageInputs, length: int) -> None:
        """Remembers what the cache will hold: the first `length` tokens of the first row."""
        self._embeds, self._positions = inputs.embeds[0, :length], inputs.positions[:, 0, :length]


def first_predicting(labels: Int[Tensor, "b l"]) -> int:
    """Returns the first token whose hidden state predicts a label, over all rows."""
    return int((labels != IGNORE_INDEX).any(0).int().argmax()) - 1


def _chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _agreement(
    a: Float[Tensor, "b l m"],
    b: Float[Tensor, "b2 l m"],
    a_positions: Float[Tensor, "a1 b l"],
    b_positions: Float[Tensor, "a1 b2 l"],
) -> int:
    """Returns the number of tokens from the left that are equal in `a` and every row of `b`.

    The comparison allows rounding errors: the same frame, projected in another batch, may differ in
    its last bits.
    """
    length = b.shape[1]
    if not length:
        return 0
    scale = torch.stack(torch.aminmax(b)).abs().amax()
    for part in _chunks(0, length, _COMPARED):  # a few at a time, because each is a copy
        off = (a[:, part] - b[:, part]).abs().amax(-1)
        far = off > 64 * torch.finfo(b.dtype).eps * scale  # b2 l
        moved = (a_positions[..., part] != b_positions[..., part]).any(0)
        differ = (far | moved).any(0)  # l
        if bool(differ.any()):
            return part.start + int(differ.long().argmax())
    return length
