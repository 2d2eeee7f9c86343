"""SigLIP as the encoder: transformers' vision tower, and its text tower if there is one."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import (
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lightning_modules.spec import set_attention

from .base import no_prompts
from .chunks import CHUNK_FRAMES, check_chunk_frames, run_layers
from .prompt import extend_context
from .towers import (
    FrameEncoder,
    check_given,
    check_image_size,
    embed_patches,
    layers_before,
    load_whole,
    tower_sizes,
    tower_spec,
)


class SiglipEncoder(FrameEncoder):
    """An encoder that returns the patches of hidden state `feature_layer`.

    It reads prompts only if it has a text tower. Give either `source` or `config`.

    Args:
        source: hub id or folder of a whole SigLIP model, vision and text.
        config: sizes of a new model with random weights: `{"vision": {...}, "text": {...}}`, with
            the field names of transformers' SigLIP configs. Without `text`, it reads no prompts.
        feature_layer, context_length, kept_positions, attention, chunk_frames: as in
            `ClipEncoder`.
        image_size: side of a frame in pixels, which the data reads; must equal that of `source` or
            `config`.

    Raises:
        ValueError: the arguments do not fit together.
    """

    per_frame = True

    def __init__(
        self,
        source: str | None = None,
        config: Mapping[str, Any] | None = None,
        feature_layer: int = -2,
        context_length: int | None = 196,
        kept_positions: int = 20,
        image_size: int | None = None,
        attention: str = "sdpa",
        chunk_frames: int | None = CHUNK_FRAMES,
    ):
        super().__init__()
        towers: Any = _load(source, config)
        set_attention(towers, "encoder", attention)
        self.reads_prompts = isinstance(towers, SiglipModel)
        self.vision = towers.vision_model if self.reads_prompts else towers
        self.text = towers.text_model if self.reads_prompts else None
        architecture = self.vision.config
        check_image_size(image_size, architecture.image_size)
        self.feature_layer, self.kept_positions = feature_layer, kept_positions
        self.attention = attention
        self.chunk_frames = check_chunk_frames(chunk_frames)
        layers = self.vision.encoder.layers
        self.vision.encoder.layers = layers[: layers_before(feature_layer, len(layers))]
        self.width, self.image_size = architecture.hidden_size, architecture.image_size
        side = architecture.image_size // architecture.patch_size
        self.grid = (side, side)

        self.stretched = self.text is not None and context_length is not None
        if self.text is not None:
            self.vision.head.probe.requires_grad_(False)  # `align` does not use it
            if context_length is not None:
                extend_context(self.text, context_length, kept_positions)
            self.context_length = self.text.config.max_position_embeddings

    def encode(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        reads, layers = [self.vision.embeddings], self.vision.encoder.layers
        return run_layers(self._embed, reads, layers, frames, self.chunk_frames)

    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        """Applies the tower's pooling head to each patch alone.

        Attention over a single patch returns the value of that patch.
        """
        if self.text is None:
            raise no_prompts()
        head, width = self.vision.head, self.width
        weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
        value = linear(self.vision.post_layernorm(patches), weight[2 * width :], bias[2 * width :])
        seen = head.attention.out_proj(value)
        return seen + head.mlp(head.layernorm(seen))

    def encode_prompt(
        self, prompt_ids: Int[Tensor, "b k"], prompt_mask: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b e"]:
        """Returns the projected state of the last position of each prompt.

        SigLIP was trained on texts that are padded to all positions, and it attends to the padding.
        So every prompt is padded to the full length here.

        Raises:
            ValueError: the prompts have more tokens than the text tower has positions.
        """
        if self.text is None:
            raise no_prompts()
        room = self.context_length - prompt_ids.shape[1]
        if room < 0:
            raise ValueError(
                f"a prompt of {prompt_ids.shape[1]} tokens, but the text tower has "
                f"{self.context_length} positions: cut prompts to that length or raise "
                "model.encoder.context_length"
            )
        padding = self.text.config.pad_token_id
        filled = pad(prompt_ids.where(prompt_mask, padding), (0, room), value=padding)
        # Pass positions: the tower's own are in a buffer that no checkpoint stores.
        positions = torch.arange(self.context_length, device=prompt_ids.device)[None]
        return self.text(filled, position_ids=positions).pooler_output

    def prompt_modules(self) -> list[nn.Module]:
        if self.text is None:
            return [self.vision.post_layernorm, *self._heads()]
        return [self.vision.post_layernorm, *self._heads(), self.text]

    def blocks(self) -> list[nn.Module]:
        text = [] if self.text is None else self.text.encoder.layers
        return [*self.vision.encoder.layers, *text]

    def to_spec(self) -> dict:
        config = {"vision": tower_sizes(self.vision.config)}
        if self.text is not None:
            config["text"] = tower_sizes(self.text.config)
        return tower_spec(
            self,
            config,
            context_length=self.context_length if self.stretched else None,
            kept_positions=self.kept_positions,
        )

    def _heads(self) -> list[nn.Module]:
        return [self.vision.head] if self.vision.use_head else []

    def _embed(self, frames: Num[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
        """Returns the patch embeddings with positions added.

        It replaces transformers' own forward for the reason given in `clip.embed`.
        """
        embeddings = self.vision.embeddings
        patches = embed_patches(embeddings, _normalise(frames))  # n p d
        return patches + embeddings.position_embedding.weight


def _normalise(frames: Num[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Normalises uint8 RGB to -1 … 1; float frames are returned unchanged."""
    return frames if frames.is_floating_point() else frames / 127.5 - 1


def _load(source: str | None, config: Mapping[str, Any] | None) -> PreTrainedModel:
    check_given(source, config)
    if config is None:
        return load_whole(SiglipModel, source, "SigLIP")
    vision = dict(config["vision"])
    if "text" not in config:
        return SiglipVisionModel(SiglipVisionConfig(**vision))
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=dict(config["text"])))
