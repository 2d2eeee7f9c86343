"""LLaVA-NeXT as transformers stores it (llava-hf/llava-v1.6-*): CLIP, two linears, an LLM."""

from typing import Any

from transformers import LlavaNextConfig, PreTrainedConfig

from lightning_modules.encoder.towers import tower_sizes
from lightning_modules.importers.base import Importer
from lightning_modules.importers.match import Rule

#: Matches the prefixes of transformers 4.x, of 5.x, and of 5.x when it writes for older readers.
TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"

LLAVA_RULES = (
    Rule(TOWER, "encoder.vision."),
    Rule(r"(?:model\.)?multi_modal_projector\.", "projector."),
    Rule(r"(?:model\.)?image_newline$", "image_newline"),
    Rule(r"(?:language_model\.)?lm_head\.", "llm.lm.lm_head."),
    Rule(r"(?:model\.)?language_model\.(?:model\.)?", "llm.lm.model."),
)


class LlavaNextImporter(Importer):
    """Imports LLaVA-NeXT with CLIP's vision tower only, so prompt-guided poolers cannot be used.

    As published, patches are not pooled, and rows of tiles end with `image_newline`.
    """

    name = "llava_next"
    architecture = "LlavaNextForConditionalGeneration"
    rules = LLAVA_RULES

    def stages(self) -> dict[str, dict[str, Any]]:
        config: Any = LlavaNextConfig.from_dict(self.config)
        check_projector(config)
        return {
            "encoder": {
                "_target_": "lightning_modules.encoder.clip_vision.ClipVisionEncoder",
                "config": {"vision": tower_sizes(config.vision_config)},
                "feature_layer": config.vision_feature_layer,
            },
            "pooler": {"_target_": "lightning_modules.pooler.identity.IdentityPooler"},
            "rotary": {"_target_": "lightning_modules.rotary.vanilla.VanillaRope"},
            "llm": causal_lm(config.text_config),
            "tiles": {"newline": True},
        }

    def on_purpose(self) -> list[str]:
        config: Any = LlavaNextConfig.from_dict(self.config)
        behind = layers_behind(config.vision_config, config.vision_feature_layer)
        return [*super().on_purpose(), *behind]


def causal_lm(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the spec of an LLM with this config, without the dtype of its weights."""
    notes = ("transformers_version", "architectures", "dtype", "_name_or_path")
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in notes}
    return {
        "_target_": "lightning_modules.llm.causal_lm.CausalLM",
        "config": {**fields, "model_type": config.model_type},
    }


def layers_behind(vision: Any, feature_layer: int) -> list[str]:
    """Returns globs of the vision layers after hidden state `feature_layer`, which we drop."""
    depth = vision.num_hidden_layers
    kept = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    return [f"*vision_tower.*layers.{layer}.*" for layer in range(kept, depth)]


def check_projector(config: Any) -> None:
    """Refuses settings that our projector does not support.

    Raises:
        ValueError: a setting is not supported; the message names the field of `config.json`.
    """
    wanted = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_select_strategy": (
            "full" if config.model_type == "llava_onevision" else "default"
        ),
    }
    for key, value in wanted.items():
        if getattr(config, key, value) != value:
            raise ValueError(
                f"{key}={getattr(config, key)!r} of its config.json is not supported, only "
                f"{value!r}"
            )
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer={config.vision_feature_layer} of its config.json is not "
            "supported, only a single layer"
        )
