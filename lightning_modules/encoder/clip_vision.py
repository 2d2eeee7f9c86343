"""CLIP's vision tower without its text tower, as LLaVA's checkpoints store it."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from lightning_modules.spec import set_attention

from .chunks import CHUNK_FRAMES, check_chunk_frames
from .clip import run_tower
from .towers import FrameEncoder, check_image_size, layers_before, tower_sizes, tower_spec


class ClipVisionEncoder(FrameEncoder):
    """An encoder that returns the patches of hidden state `feature_layer`; cannot read prompts.

    Args:
        config: `{"vision": {...}}`, with the field names of transformers' CLIPVisionConfig.
        feature_layer, attention, chunk_frames: as in `ClipEncoder`.
        image_size: side of a frame in pixels, which the data reads; must equal that of `config`.

    Raises:
        ValueError: the arguments do not fit together.
    """

    per_frame = True
    class_tokens = 1

    def __init__(
        self,
        config: Mapping[str, Any],
        feature_layer: int = -2,
        image_size: int | None = None,
        attention: str = "sdpa",
        chunk_frames: int | None = CHUNK_FRAMES,
    ):
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**config["vision"]))
        set_attention(self.vision, "encoder", attention)
        architecture: Any = self.vision.config
        check_image_size(image_size, architecture.image_size)
        self.feature_layer, self.attention = feature_layer, attention
        self.chunk_frames = check_chunk_frames(chunk_frames)
        layers = self.vision.encoder.layers
        self.vision.encoder.layers = layers[: layers_before(feature_layer, len(layers))]
        self.width, self.image_size = architecture.hidden_size, architecture.image_size
        side = architecture.image_size // architecture.patch_size
        self.grid = (side, side)

    def encode(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        layers = self.vision.encoder.layers
        hidden = run_tower(self.vision, layers, frames, self.chunk_frames)
        return hidden[:, 1:]

    def prompt_modules(self) -> list[nn.Module]:
        return [self.vision.post_layernorm]  # only the tower's own pooled output needs it

    def blocks(self) -> list[nn.Module]:
        return list(self.vision.encoder.layers)

    def to_spec(self) -> dict:
        return tower_spec(self, {"vision": tower_sizes(self.vision.config)})
