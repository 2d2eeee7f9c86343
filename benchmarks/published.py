"""The same model, run as the published code runs it. It is the baseline for our shortcuts.

It works as in LLaVA, PPLLaVA and VideoRoPE. CLIP runs all layers and keeps every hidden state, of
which the second to last is read. The projector applies both linears to every patch before the
windows are cut. The LLM's head reads every token in float32, and the loss then ignores tokens
without a label.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from labelled_loss import full_logits_loss
from pooler import long_way
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, Grid, VideoBatch
from lightning_modules.encoder.clip import normalise
from lightning_modules.model import Output, VideoLanguageModel
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.splice.tiles import Piece


class PublishedModel(VideoLanguageModel):
    """A model with the weights of a `VideoLanguageModel` and also CLIP's last layer.

    It supports a prompt-guided pooler without stride, and CLIP without BT-Adapter.
    """

    @staticmethod
    def spec(spec: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the spec of our model, changed to use the whole CLIP tower."""
        return {**spec, "encoder": {**spec["encoder"], "feature_layer": -1}}

    def forward(self, batch: VideoBatch, packing: int | None = None) -> Output:
        tower: Any = self.encoder.vision
        frames = normalise(batch.frames).to(self.projector.linear_1.weight.dtype)
        states = tower(frames, output_hidden_states=True).hidden_states
        inputs = self.compose(batch, states[-2][:, 1:], packing=packing)
        hidden = self.llm(inputs.embeds, inputs.attention_mask, inputs.positions)
        loss = full_logits_loss(hidden, inputs.labels, self.llm.head)  # pyright: ignore[reportArgumentType]
        terms = (inputs.labels[:, 1:] != IGNORE_INDEX).sum()
        return Output((loss * terms)[None], terms[None], hidden, inputs)  # one row: their sum

    def pool(
        self, pieces: Sequence[Piece], relevance: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Grid]]:
        assert isinstance(self.pooler, PromptGuidedPooler)
        pooled = []
        for piece, score in zip(pieces, relevance, strict=True):
            assert score is not None
            pooled.append(long_way(self.pooler, self.projector, piece.patches, score))
        return [p.flatten(0, 2) for p in pooled], [Grid(*p.shape[:3]) for p in pooled]
