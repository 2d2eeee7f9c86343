"""CLIP as the encoder: transformers' vision and text towers, cut after the feature layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from datamodules.batch import Visual
from lightning_modules.spec import set_attention
from lightning_modules.tokens import VisualTokens

from .bt_adapter import BTAdapter
from .chunks import CHUNK_FRAMES, check_chunk_frames, run_layers
from .prompt import extend_context
from .towers import (
    FrameEncoder,
    check_given,
    check_image_size,
    embed_patches,
    layers_before,
    load_whole,
    on_frames,
    tower_sizes,
    tower_spec,
)


class ClipEncoder(FrameEncoder):
    """An encoder that returns the patches of hidden state `feature_layer`, and reads prompts.

    Give either `source` or `config`.

    Args:
        source: hub id or folder of a whole CLIP model, vision and text.
        config: sizes of a new model with random weights: `{"vision": {...}, "text": {...},
            "projection_dim": n}`, with the field names of transformers' CLIP configs.
        feature_layer: index of the hidden state, as transformers counts: 0 is before the first
            layer, -1 after the last one. Later layers are neither kept nor run.
        context_length: number of text positions. A shorter position table is stretched to this
            length; None leaves the table unchanged.
        kept_positions: number of first text positions that are not stretched.
        bt_adapter: `{"depth": ..., "max_frames": ...}`: adds BT-Adapter beside the last `depth`
            layers of the whole tower, for visuals of up to `max_frames`.
        image_size: side of a frame in pixels, which the data reads; must equal that of `source` or
            `config`.
        attention: attention implementation of both towers, as transformers names it: sdpa, eager,
            flash_attention_2, flex_attention, …
        chunk_frames: frames that run at a time when no gradient is needed; None: all at once. The
            layers beside BT-Adapter take all frames, because frames attend to each other there.

    Raises:
        ValueError: the arguments do not fit together; the message names them and what would fit.
    """

    class_tokens = 1
    reads_prompts = True

    def __init__(
        self,
        source: str | None = None,
        config: Mapping[str, Any] | None = None,
        feature_layer: int = -2,
        context_length: int | None = 248,
        kept_positions: int = 20,
        bt_adapter: Mapping[str, int] | None = None,
        image_size: int | None = None,
        attention: str = "sdpa",
        chunk_frames: int | None = CHUNK_FRAMES,
    ):
        super().__init__()
        clip = _load(source, config)
        set_attention(clip, "encoder", attention)
        check_image_size(image_size, clip.vision_model.config.image_size)
        self.feature_layer, self.kept_positions = feature_layer, kept_positions
        self.attention = attention
        self.chunk_frames = check_chunk_frames(chunk_frames)
        self.stretched = context_length is not None
        self.bt_adapter = dict(bt_adapter) if bt_adapter else None

        self.vision, self.text = clip.vision_model, clip.text_model
        self.visual_projection, self.text_projection = clip.visual_projection, clip.text_projection
        if context_length is not None:
            extend_context(self.text, context_length, kept_positions)
        layers = self.vision.encoder.layers
        kept = layers_before(feature_layer, len(layers))
        self.branch_start = kept
        self.adapter = None
        if self.bt_adapter:
            self.branch_start = _branch_start(self.bt_adapter["depth"], kept, len(layers))
            beside = list(layers[self.branch_start : kept])
            max_frames = self.bt_adapter["max_frames"]
            self.adapter = BTAdapter(self.vision.config, beside, max_frames)
        self.vision.encoder.layers = layers[:kept]

        sizes: Any = self.vision.config
        self.width, self.image_size = sizes.hidden_size, sizes.image_size
        side = sizes.image_size // sizes.patch_size
        self.grid = (side, side)
        self.per_frame = self.adapter is None
        self.context_length = self.text.config.max_position_embeddings

    def forward(self, visuals: Sequence[Visual], class_token: bool = False) -> list[VisualTokens]:
        """Returns the patches; with `class_token`, only the class token of each frame instead."""
        if not class_token or not visuals:
            return super().forward(visuals)
        states = self.hidden_state(*self.stack(visuals))
        return on_frames(states[:, :1, None], visuals)  # n s d -> n 1 1 d

    def encode(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        return self.hidden_state(frames, frame_counts)[:, 1:]

    def hidden_state(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n s d"]:
        """Returns the class token and the patches of each frame: s = 1 + p."""
        tower, layers = self.vision, self.vision.encoder.layers
        hidden = run_tower(tower, layers[: self.branch_start], frames, self.chunk_frames)
        if self.adapter is None or not frame_counts:
            return hidden
        beside = list(tower.encoder.layers[self.branch_start :])
        positions = tower.embeddings.position_embedding.weight
        return self.adapter(hidden, frame_counts, beside, positions)

    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        return self.visual_projection(self.vision.post_layernorm(patches))

    def encode_prompt(
        self, prompt_ids: Int[Tensor, "b k"], prompt_mask: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b e"]:
        """Returns the projected state of the first end-of-text token of each prompt.

        Raises:
            ValueError: the prompts have more tokens than the text tower has positions.
        """
        length = prompt_ids.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"a prompt of {length} tokens, but the text tower has {self.context_length} "
                "positions: cut prompts to that length or raise model.encoder.context_length"
            )
        # Pass positions: the tower's own are in a buffer that no checkpoint stores.
        positions = torch.arange(length, device=prompt_ids.device)[None]
        text = self.text(prompt_ids, attention_mask=prompt_mask, position_ids=positions)
        return self.text_projection(text.pooler_output)

    def prompt_modules(self) -> list[nn.Module]:
        aligned = [self.vision.post_layernorm, self.visual_projection]
        return [*aligned, self.text, self.text_projection]

    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard; BT-Adapter is one unit.

        The layers of BT-Adapter run once for each distinct length of the visuals.
        """
        beside = [self.adapter] if self.adapter else []
        return [*self.vision.encoder.layers, *beside, *self.text.encoder.layers]

    def copied(self) -> dict[str, str]:
        if self.adapter is None:
            return {}
        return {
            f"adapter.spatial.{n}.{name}": f"vision.encoder.layers.{self.branch_start + n}.{name}"
            for n, layer in enumerate(self.adapter.spatial)
            for name in layer.state_dict()
        }

    def to_spec(self) -> dict:
        config = {
            "vision": tower_sizes(self.vision.config),
            "text": tower_sizes(self.text.config),
            "projection_dim": self.visual_projection.out_features,
        }
        return tower_spec(
            self,
            config,
            context_length=self.context_length if self.stretched else None,
            kept_positions=self.kept_positions,
            bt_adapter=self.bt_adapter,
        )


def normalise(frames: Num[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Normalises uint8 RGB to CLIP's input; float frames are returned unchanged."""
    if frames.is_floating_point():
        return frames
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=frames.device)[:, None, None]
    std = torch.tensor(OPENAI_CLIP_STD, device=frames.device)[:, None, None]
    return (frames / 255 - mean) / std


def _load(source: str | None, config: Mapping[str, Any] | None) -> CLIPModel:
    check_given(source, config)
    if config is None:
        return load_whole(CLIPModel, source, "CLIP")
    text, vision = dict(config["text"]), dict(config["vision"])
    dim = config["projection_dim"]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))


def embed(tower: CLIPVisionModel, frames: Float[Tensor, "n c h w"]) -> Float[Tensor, "n s d"]:
    """Returns the embeddings of the class token and the patches, with positions added.

    It replaces transformers' own forward, which reads the position ids from a buffer that no
    checkpoint stores. A tower built on the meta device would read uninitialised memory there.
    """
    embeddings = tower.embeddings
    patches = embed_patches(embeddings, frames)  # n p d
    token = embeddings.class_embedding.expand(frames.shape[0], 1, -1)
    return torch.cat([token, patches], dim=1) + embeddings.position_embedding.weight


def run_tower(
    tower: CLIPVisionModel,
    layers: nn.ModuleList,
    frames: Num[Tensor, "n c h w"],
    chunk_frames: int | None,
) -> Float[Tensor, "n s d"]:
    """Returns the hidden states after `layers`, which are the first layers of `tower`."""

    def start(part: Num[Tensor, "n c h w"]) -> Float[Tensor, "n s d"]:
        return tower.pre_layrnorm(embed(tower, normalise(part)))

    reads = (tower.embeddings, tower.pre_layrnorm)
    return run_layers(start, reads, layers, frames, chunk_frames)


def _branch_start(adapter_depth: int, kept: int, depth: int) -> int:
    """Returns the index of the first layer that has BT-Adapter beside it."""
    start = depth - adapter_depth
    if not 0 <= start < kept:
        raise ValueError(
            f"model.encoder.bt_adapter.depth {adapter_depth} does not fit: the features come after "
            f"layer {kept} of {depth}, so choose {depth - kept + 1} to {depth}"
        )
    return start
