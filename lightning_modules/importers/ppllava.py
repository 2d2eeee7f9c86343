"""PPLLaVA's published weights: LLaVA-NeXT, CLIP's text tower in the projector, and BT-Adapter.

Liu et al., arXiv 2411.02327. Names and settings come from its code,
ppllava/models/{llava_interleave,llava_projector,clip,clip_btadapter}.py.
"""

from typing import Any

from torch import Tensor
from transformers import CLIPConfig, LlavaNextConfig

from lightning_modules.encoder.towers import tower_sizes
from lightning_modules.importers.base import Importer
from lightning_modules.importers.llava_next import (
    LLAVA_RULES,
    TOWER,
    causal_lm,
    check_projector,
    layers_behind,
)
from lightning_modules.importers.match import Rule

#: Constants of the published code: number of kept positions, and stretch factor of the others.
KEPT_POSITIONS, FACTOR = 20, 4


def _kept(table: Tensor) -> Tensor:
    return table[:KEPT_POSITIONS]


def _stretched(table: Tensor) -> Tensor:
    return table[KEPT_POSITIONS:]


def _one(scalar: Tensor) -> Tensor:
    return scalar.reshape(1)


_GUIDE = r"multi_modal_projector\.clip_"
_TABLE = r"multi_modal_projector\.clip_text_model\.embeddings\.position_embedding"
_OURS = "encoder.text.embeddings.position_embedding"
_TEMPORAL = rf"{TOWER}btadapter_T_layers\.(\d+)\."


class PPLLaVAImporter(Importer):
    """Imports PPLLaVA; also reads the config of its CLIP, which its config calls `clip_weight`."""

    name = "ppllava"
    architecture = "LlavaInterleaveForConditionalGeneration"
    rules = (
        Rule(rf"{_TEMPORAL}layer_norm1", r"encoder.adapter.temporal.\1.layer_norm"),
        Rule(rf"{_TEMPORAL}temporal_fc", r"encoder.adapter.temporal.\1.out"),
        Rule(_TEMPORAL, r"encoder.adapter.temporal.\1."),
        Rule(rf"{TOWER}btadapter_S_layers", "encoder.adapter.spatial"),
        Rule(rf"{TOWER}btadapter_cls_token", "encoder.adapter.class_token", Tensor.flatten),
        Rule(rf"{TOWER}btadapter_time_embed", "encoder.adapter.time_positions"),
        # PPLLaVA does not use the tower's own norm; the copy in its projector aligns patches.
        Rule(rf"{TOWER}post_layernorm", "unused"),
        Rule(rf"{_GUIDE}visual_ln", "encoder.vision.post_layernorm"),
        Rule(rf"{_GUIDE}visual_projection", "encoder.visual_projection"),
        Rule(rf"{_GUIDE}text_projection", "encoder.text_projection"),
        # The extended context is stored as two tables, each used in part.
        Rule(rf"{_TABLE}$", f"{_OURS}.kept", _kept),
        Rule(rf"{_TABLE}_res$", f"{_OURS}.stretched", _stretched),
        Rule(rf"{_GUIDE}text_model", "encoder.text"),
        Rule(r"multi_modal_projector\.logit_scale", "pooler.logit_scale", _one),
        *LLAVA_RULES,
    )

    def stages(self) -> dict[str, dict[str, Any]]:
        if self.config.get("pooling") != "ppllava" or self.config.get("qwen"):
            raise ValueError(
                f"pooling={self.config.get('pooling')!r}, qwen={self.config.get('qwen')} of its "
                "config.json: only PPLLaVA's pooling by CLIP is read"
            )
        llava = self._llava()
        check_projector(llava)
        return {
            "encoder": self._encoder(llava),
            "pooler": self._pooler(),
            "rotary": {"_target_": "lightning_modules.rotary.vanilla.VanillaRope"},
            "llm": causal_lm(llava.text_config),
        }

    def on_purpose(self) -> list[str]:
        llava = self._llava()
        kept, start = self._branch(llava)
        unreached = [
            f"*btadapter_{kind}_layers.{layer}.*"
            for kind in "ST"
            for layer in range(max(0, kept - start), self.config.get("btadapter_depth", 0))
        ]
        if kept <= start:
            unreached = ["*btadapter_*"]
        behind = layers_behind(llava.vision_config, llava.vision_feature_layer)
        own = ["vision_tower.*post_layernorm.*", "image_newline"]
        return [*super().on_purpose(), *behind, *unreached, *own]

    def _llava(self) -> Any:
        # `depth` and `max_T` in the CLIP config belong to BT-Adapter.
        vision = {
            k: v for k, v in self.config["vision_config"].items() if k not in ("depth", "max_T")
        }
        return LlavaNextConfig.from_dict({**self.config, "vision_config": vision})

    def _branch(self, llava: Any) -> tuple[int, int]:
        """Returns the number of layers before the features, and the first layer with BT-Adapter."""
        depth, layer = llava.vision_config.num_hidden_layers, llava.vision_feature_layer
        kept = layer if layer >= 0 else depth + 1 + layer
        beside = self.config.get("btadapter_depth", 4) if self.config.get("btadapter") else 0
        return kept, depth - beside

    def _encoder(self, llava: Any) -> dict[str, Any]:
        clip = self._clip()
        kept, start = self._branch(llava)
        others = clip.text_config.max_position_embeddings - KEPT_POSITIONS
        adapter = {
            "depth": self.config.get("btadapter_depth", 4),
            "max_frames": self.config.get("max_T", 64),
        }
        return {
            "_target_": "lightning_modules.encoder.clip.ClipEncoder",
            "config": {
                "vision": tower_sizes(llava.vision_config),
                "text": tower_sizes(clip.text_config),
                "projection_dim": clip.projection_dim,
            },
            "feature_layer": llava.vision_feature_layer,
            "context_length": KEPT_POSITIONS + FACTOR * others
            if self.config.get("extend_clip")
            else None,
            "kept_positions": KEPT_POSITIONS,
            # A BT-Adapter that starts after the features does not change them.
            "bt_adapter": adapter if start < kept else None,
        }

    def _clip(self) -> Any:
        source = self.clip or str(self.config.get("clip_weight"))
        try:
            return CLIPConfig.from_pretrained(source)
        except (OSError, ValueError):
            raise ValueError(
                f"the config of the CLIP that it was made with cannot be read from {source!r}: "
                "name a hub id or folder of that CLIP with --clip"
            ) from None

    def _pooler(self) -> dict[str, Any]:
        stride, image_stride = (
            self.config.get(key) for key in ("pooling_stride", "image_pooling_stride")
        )
        if image_stride and (not stride or list(image_stride[1:]) != list(stride[1:])):
            raise ValueError(
                f"image_pooling_stride={image_stride} of its config.json: images must have the "
                f"same stride as videos, pooling_stride={stride}"
            )
        return {
            "_target_": "lightning_modules.pooler.prompt_guided.PromptGuidedPooler",
            "kernel": self.config.get("pooling_kernel"),
            "stride": stride,
            "output_size": self.config.get("pllava_pooling_shape"),
            "image_kernel": self.config.get("image_pooling_kernel"),
            "crop": True,
            "temperature": self.config.get("pooling_temp", 0.01),
            "double_softmax": True,
        }
