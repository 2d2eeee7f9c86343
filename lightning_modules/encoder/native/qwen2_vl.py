"""Qwen2-VL's vision tower as the encoder."""

from collections.abc import Mapping
from typing import Any

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from lightning_modules.encoder.chunks import CHUNK_FRAMES

from .base import NativeEncoder
from .source import load_tower, vision_sizes


class Qwen2VLEncoder(NativeEncoder):
    """Qwen2-VL's tower (arXiv 2409.12191 §2.1): its patches attend to their whole time step.

    Give either `source` or `config`.

    Args:
        source: hub id or folder of a whole Qwen2-VL, or of VideoRoPE's checkpoints. Only its vision
            tower is read.
        config: sizes of a new tower with random weights, with the field names of transformers'
            `Qwen2VLVisionConfig`.
        attention: attention implementation, as transformers names it: sdpa, eager,
            flash_attention_2, …
        chunk_frames: frames that run at a time when no gradient is needed, rounded down to whole
            time steps, but at least one step; None: all at once.
        factor: height and width of frames are multiples of this number of pixels, which the data
            reads; must equal patch_size * spatial_merge_size of `source` or `config`.

    Raises:
        ValueError: the arguments do not fit together, or `source` holds no such tower.
    """

    def __init__(
        self,
        source: str | None = None,
        config: Mapping[str, Any] | None = None,
        attention: str = "sdpa",
        chunk_frames: int | None = CHUNK_FRAMES,
        factor: int | None = None,
    ):
        tower = load_tower(Qwen2VisionTransformerPretrainedModel, "qwen2_vl", source, config)
        super().__init__(tower, attention, chunk_frames, factor)

    @property
    def config(self) -> dict[str, Any]:
        # `hidden_size` is the width after the merger's linears, which are not in the encoder.
        return vision_sizes(self.tower.config, Qwen2VLVisionConfig, without=("hidden_size",))
