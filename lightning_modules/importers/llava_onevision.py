"""LLaVA-OneVision as transformers stores it: SigLIP's vision tower, two linears, Qwen2."""

from typing import Any

from transformers import LlavaOnevisionConfig

from lightning_modules.encoder.towers import tower_sizes
from lightning_modules.importers.base import Importer
from lightning_modules.importers.llava_next import (
    LLAVA_RULES,
    causal_lm,
    check_projector,
    layers_behind,
)


class LlavaOnevisionImporter(Importer):
    """Imports LLaVA-OneVision: images keep their patches, video frames are pooled 2 x 2.

    On a grid with even sides, this equals the published bilinear halving. On the odd grid of
    27 x 27, the published code gives 14 x 14 tokens from overlapping windows. Ours gives 13 x 13,
    without the last row and column.
    """

    name = "llava_onevision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    rules = LLAVA_RULES

    def stages(self) -> dict[str, dict[str, Any]]:
        config: Any = LlavaOnevisionConfig.from_dict(self.config)
        check_projector(config)
        return {
            "encoder": {
                "_target_": "lightning_modules.encoder.siglip.SiglipEncoder",
                "config": {"vision": tower_sizes(config.vision_config)},
                "feature_layer": config.vision_feature_layer,
                "context_length": None,
            },
            "pooler": {
                "_target_": "lightning_modules.pooler.average.AveragePooler",
                "kernel": [1, 2, 2],
                "image_kernel": [1, 1, 1],
                "crop": True,
            },
            "rotary": {"_target_": "lightning_modules.rotary.vanilla.VanillaRope"},
            "llm": causal_lm(config.text_config),
        }

    def on_purpose(self) -> list[str]:
        config: Any = LlavaOnevisionConfig.from_dict(self.config)
        behind = layers_behind(config.vision_config, config.vision_feature_layer)
        return [*super().on_purpose(), *behind, "*image_newline", "*vision_tower.*head.*"]
