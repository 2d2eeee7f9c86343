"""The same model, run as the published code runs it. It is the baseline for our shortcuts.

It works as in LLaVA, PPLLaVA and VideoRoPE. CLIP runs all layers and keeps every hidden state, of
which the second to last is read. The projector applies both linears to every patch before the
windows are cut. The LLM's head reads every token in float32, and the loss then ignores tokens
without a label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from labelled_loss import full_logits_loss
from pooler import long_way
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, Grid, VideoBatch
from lightning_modules.encoder.clip import normalise
from lightning_modules.encoder.towers import on_frames
from lightning_modules.model import Output, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.tokens import VisualTokens


class PublishedModel(VideoLanguageModel):
    """A model with the weights of a `VideoLanguageModel` and also CLIP's last layer.

    It supports a prompt-guided pooler without stride, and CLIP without BT-Adapter.
    """

    @staticmethod
    def spec(spec: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the spec of our model, changed to use the whole CLIP tower."""
        return {**spec, "encoder": {**spec["encoder"], "feature_layer": -1}}

    def __init__(self, config: VideoLanguageModelConfig):
        super().__init__(config)
        self.pooler.forward = self._pool  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, batch: VideoBatch, packing: int | None = None) -> Output:
        tower: Any = self.encoder.vision
        visuals = batch.visuals
        frames = normalise(torch.cat([visual.frames for visual in visuals]))
        states = tower(
            frames.to(self.projector.linear_1.weight.dtype), output_hidden_states=True
        ).hidden_states
        patches = states[-2][:, 1:].unflatten(1, self.encoder.grid)  # n p d -> n h w d
        inputs = self.compose(batch, on_frames(patches, visuals), packing=packing)
        hidden = self.llm(inputs.embeds, inputs.attention_mask, inputs.positions)
        loss = full_logits_loss(hidden, inputs.labels, self.llm.head)  # pyright: ignore[reportArgumentType]
        terms = (inputs.labels[:, 1:] != IGNORE_INDEX).sum()
        return Output((loss * terms)[None], terms[None], hidden, inputs)  # one row: their sum

    def _pool(self, tokens: VisualTokens, relevance: Tensor, expand: Any) -> VisualTokens:
        """Returns the pooled tokens, whose features both linears have projected."""
        assert isinstance(self.pooler, PromptGuidedPooler)
        patches, score = tokens.as_grid(), relevance.view(*tokens.grid)
        pooled = long_way(self.pooler, self.projector, patches, score)
        grid = Grid(*pooled.shape[:3])
        return replace(tokens, features=pooled.flatten(0, 2), grid=grid)

    def _contract(self, pooled: Sequence[VisualTokens]) -> list[VisualTokens]:
        return list(pooled)
