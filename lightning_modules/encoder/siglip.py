"""SigLIP as the encoder: transformers' vision tower, and its text tower where there is one."""

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

from .base import Encoder
from .chunks import CHUNK_FRAMES, check_chunk_frames, run_layers
from .clip_vision import no_prompts
from .prompt import extend_context
from .towers import (
    check_given,
    check_image_size,
    embed_patches,
    layers_before,
    load_whole,
    tower_sizes,
)


class SiglipEncoder(Encoder):
    """Patches of hidden state `feature_layer`, in one space with prompts if it has a text tower.

    Give one of `source` and `config`.

    Args:
        source: hub id or folder of a whole SigLIP, vision and text.
        config: sizes for one with random weights: `{"vision": {...}, "text": {...}}`, the names
            in it those of transformers' SigLIP configs. Without `text` no prompt is read.
        feature_layer, context_length, kept_positions, attention, chunk_frames: as in
            `ClipEncoder`.
        image_size: side of a frame in pixels, for the data to read; that of `source` or `config`.

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
            self.vision.head.probe.requires_grad_(False)  # `align` asks nothing with it
            if context_length is not None:
                extend_context(self.text, context_length, kept_positions)
            self.context_length = self.text.config.max_position_embeddings

    def forward(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        reads, layers = [self.vision.embeddings], self.vision.encoder.layers
        return run_layers(self._embed, reads, layers, frames, self.chunk_frames)

    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        """What the tower's pooling head makes of each patch by itself: its attention to one patch
        is that patch's value.
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
        """The state of the last position, projected.

        SigLIP was trained on texts that padding fills up to all positions, padding seen as well;
        so every prompt is filled up here, however long its neighbours are.

        Raises:
            ValueError: the prompts are longer than the text tower's positions.
        """
        if self.text is None:
            raise no_prompts()
        room = self.context_length - prompt_ids.shape[1]
        if room < 0:
            raise ValueError(
                f"a prompt of {prompt_ids.shape[1]} tokens, but the text tower has "
                f"{self.context_length} positions: cut prompts there or raise "
                "model.encoder.context_length"
            )
        padding = self.text.config.pad_token_id
        filled = pad(prompt_ids.where(prompt_mask, padding), (0, room), value=padding)
        # Positions are given because the tower's own are a buffer that no checkpoint holds.
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
        return {
            "_target_": f"{type(self).__module__}.{type(self).__qualname__}",
            "config": config,
            "feature_layer": self.feature_layer,
            "context_length": self.context_length if self.stretched else None,
            "kept_positions": self.kept_positions,
            "image_size": self.image_size,
            "attention": self.attention,
            "chunk_frames": self.chunk_frames,
        }

    def _heads(self) -> list[nn.Module]:
        return [self.vision.head] if self.vision.use_head else []

    def _embed(self, frames: Num[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
        """Not transformers' own forward, for the reason that `clip.embed` gives.

        Raises:
            ValueError: frames of another size than the tower reads.
        """
        embeddings = self.vision.embeddings
        patches = embed_patches(embeddings, _normalise(frames), self.image_size)  # n p d
        return patches + embeddings.position_embedding.weight


def _normalise(frames: Num[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """uint8 RGB to -1 … 1; floats are taken as that already."""
    return frames if frames.is_floating_point() else frames / 127.5 - 1


def _load(source: str | None, config: Mapping[str, Any] | None) -> PreTrainedModel:
    check_given(source, config)
    if config is None:
        return load_whole(SiglipModel, source, "SigLIP")
    vision = dict(config["vision"])
    if "text" not in config:
        return SiglipVisionModel(SiglipVisionConfig(**vision))
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=dict(config["text"])))
