"""A prefix cache: the LLM reads the common beginning of several rows only once."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache

from lightning_modules.model import LanguageInputs, VideoLanguageModel


class PrefixCache:
    """A KV cache of the prefix that consecutive calls share.

    The haystacks of a needle test are equal up to the needle. The part before it is read once for
    all needles, and the next depth continues from there. Two rows share the tokens whose embeddings
    and positions are equal. So this works for every pooler and rotary scheme; if nothing is equal,
    nothing is shared.

    Attributes:
        computed: tokens that went through the LLM.
        recomputed: tokens that would go through the LLM without sharing.
    """

    def __init__(self, model: VideoLanguageModel):
        self._llm = model.llm
        self._cache: Cache = DynamicCache()
        self._embeds: Float[Tensor, "l m"] | None = None
        self._positions: Float[Tensor, "a1 l"] | None = None
        self.computed = self.recomputed = 0

    @torch.no_grad()
    def hidden(self, inputs: LanguageInputs) -> tuple[Float[Tensor, "b k m"], int]:
        """Returns the hidden states of each row from token `start`, and `start`.

        Rows are padded on the right. At least the last token of a row is never shared.
        """
        lengths = inputs.mask.sum(1)
        start = min(self._alike(inputs), int(lengths.min()) - 1)
        self._read(inputs, start)
        rows = len(lengths)
        cache = copy.deepcopy(self._cache)
        if rows > 1 and start:
            cache.batch_repeat_interleave(rows)
        hidden = self._llm(
            inputs.embeds[:, start:], inputs.mask, inputs.positions[..., start:], cache
        )
        self.computed += int(lengths.sum()) - rows * start
        self.recomputed += int(lengths.sum())
        return hidden, start

    def _alike(self, inputs: LanguageInputs) -> int:
        """Returns the number of tokens from the left that are equal in all rows."""
        embeds, positions = inputs.embeds, inputs.positions
        return _agreement(embeds[:1], embeds, positions[:, :1], positions)

    def _read(self, inputs: LanguageInputs, stop: int) -> None:
        """Fills the cache with the first `stop` tokens of the first row."""
        embeds, positions = inputs.embeds[:1, :stop], inputs.positions[:, :1, :stop]
        kept = 0
        if self._embeds is not None and self._positions is not None:
            known = min(stop, self._embeds.shape[0])
            kept = _agreement(
                self._embeds[None, :known],
                embeds[:, :known],
                self._positions[:, None, :known],
                positions[..., :known],
            )
            surplus = self._embeds.shape[0] - kept
            if surplus:
                self._cache.crop(-surplus)
        if kept < stop:
            self._llm(embeds[:, kept:], None, positions[..., kept:], self._cache)
            self.computed += stop - kept
        self._embeds, self._positions = embeds[0], positions[:, 0]


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
    scale = b.abs().amax() if b.numel() else torch.zeros((), device=b.device)
    far = (a - b).abs().amax(-1) > 64 * torch.finfo(b.dtype).eps * scale  # b2 l
    differ = (far | (a_positions != b_positions).any(0)).any(0)  # l
    return int(differ.long().argmax()) if bool(differ.any()) else differ.shape[0]
