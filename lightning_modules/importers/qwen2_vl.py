"""Imports the text model of Qwen2-VL as a plain Qwen2, to combine with any rotary scheme."""

from typing import Any

from transformers import PreTrainedModel, Qwen2Config, Qwen2VLConfig

from lightning_modules.importers.base import Importer
from lightning_modules.importers.llava_next import causal_lm
from lightning_modules.importers.match import Rule
from lightning_modules.spec import build


class Qwen2VLTextImporter(Importer):
    """Writes a Qwen2 for `model.llm.source`.

    With `rotary=mrope` and its sections, it runs as in Qwen2-VL. The vision tower is not imported:
    it reads frames in pairs and of any size, which none of our encoders does.
    """

    name = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    rules = (
        Rule(r"model\.language_model\.", "model."),
        Rule(r"model\.(?!visual\.)", "model."),
        Rule(r"lm_head\.", "lm_head."),
    )

    def stages(self) -> dict[str, dict[str, Any]]:
        config: Any = Qwen2VLConfig.from_dict(self.config)
        text = config.text_config
        known = Qwen2Config().to_dict()
        fields = {key: value for key, value in text.to_dict().items() if key in known}
        rope = dict(text.rope_parameters)
        sections = rope.pop("mrope_section")
        fields |= {
            "model_type": "qwen2",
            "rope_parameters": rope,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        return {
            "rotary": {"_target_": "lightning_modules.rotary.mrope.MRope", "sections": sections},
            "llm": causal_lm(Qwen2Config(**fields)),
        }

    def on_purpose(self) -> list[str]:
        return [*super().on_purpose(), "visual.*", "model.visual.*"]

    def build(self) -> PreTrainedModel:
        return build(self.stages()["llm"]).lm
