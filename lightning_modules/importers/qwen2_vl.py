"""Imports Qwen2-VL, VideoRoPE's checkpoints, which have the same layout, and Qwen2.5-VL."""

from typing import Any

from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2Config, Qwen2VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from lightning_modules.encoder.native.source import vision_sizes
from lightning_modules.importers.base import Importer
from lightning_modules.importers.llava_next import causal_lm
from lightning_modules.importers.match import Rule
from lightning_modules.spec import build

#: Matches the names of transformers 4.45 and of 5.x. The merger's linears are our projector.
_VISUAL = r"(?:model\.)?visual\."
QWEN_RULES = (
    Rule(rf"{_VISUAL}merger\.mlp\.0\.", "projector.linear_1."),
    Rule(rf"{_VISUAL}merger\.mlp\.2\.", "projector.linear_2."),
    Rule(_VISUAL, "encoder.tower."),
    Rule(r"model\.(?:language_model\.)?", "llm.lm.model."),
    Rule(r"lm_head\.", "llm.lm.lm_head."),
)

#: The schemes of checkpoints with this layout, by the word of `--rotary`, which is that of
#: configs/rotary. The published code calls them vanilla_rope, tad_rope, m_rope and videorope.
SCHEMES = {
    "vanilla": "vanilla.VanillaRope",
    "tad": "tad.TadRope",
    "mrope": "mrope.MRope",
    "videorope": "videorope.VideoRope",
}

#: Fields of `config.json` that our components do not hold, but an export writes again.
_TOKENS = ("image", "video", "vision_start", "vision_end", "vision")


class Qwen2VLImporter(Importer):
    """Imports the tower, the merger and the LLM; the scheme is named by `rotary`."""

    name = "qwen2_vl"
    architecture = "Qwen2VLForConditionalGeneration"
    rules = QWEN_RULES
    schemes = tuple(SCHEMES)

    def read(self) -> Any:
        """Returns transformers' config of the source."""
        return Qwen2VLConfig.from_dict(self.config)

    def stages(self) -> dict[str, Any]:
        config = self.read()
        llm, sections = text_model(config)
        return {
            "encoder": self._encoder(config.vision_config),
            "pooler": {"_target_": "lightning_modules.pooler.identity.IdentityPooler"},
            "rotary": self._scheme(sections),
            "llm": causal_lm(llm),
        }

    def facts(self) -> dict[str, Any]:
        config = self.read()
        ids = {f"{name}_token_id": getattr(config, f"{name}_token_id", None) for name in _TOKENS}
        return {name: number for name, number in ids.items() if number is not None}

    def _encoder(self, vision: Any) -> dict[str, Any]:
        return {
            "_target_": "lightning_modules.encoder.native.qwen2_vl.Qwen2VLEncoder",
            "config": vision_sizes(vision, Qwen2VLVisionConfig, ["hidden_size"]),
        }

    def _scheme(self, sections: list[int] | None) -> dict[str, Any]:
        """Returns the spec of the scheme that `rotary` names.

        Raises:
            ValueError: no scheme is named.
        """
        if self.rotary is None:
            raise ValueError(
                "no config.json of this layout says which rotary scheme the model was trained "
                f"with: name it with --rotary, one of {', '.join(SCHEMES)} (Qwen2-VL's own is "
                "mrope), or import the text model alone with --format qwen2_vl_text"
            )
        spec: dict[str, Any] = {"_target_": f"lightning_modules.rotary.{SCHEMES[self.rotary]}"}
        return spec | ({"sections": sections} if self.rotary in ("mrope", "videorope") else {})


class Qwen2_5VLImporter(Qwen2VLImporter):
    """Imports Qwen2.5-VL. Without `rotary`, it has the published scheme."""

    name = "qwen2_5_vl"
    architecture = "Qwen2_5_VLForConditionalGeneration"
    schemes = ("qwen2_5_vl", *SCHEMES)

    def read(self) -> Any:
        return Qwen2_5_VLConfig.from_dict(self.config)

    def _encoder(self, vision: Any) -> dict[str, Any]:
        return {
            "_target_": "lightning_modules.encoder.native.qwen2_5_vl.Qwen2_5VLEncoder",
            "config": vision_sizes(vision, Qwen2_5_VLVisionConfig, ["out_hidden_size"]),
        }

    def _scheme(self, sections: list[int] | None) -> dict[str, Any]:
        if self.rotary not in (None, "qwen2_5_vl"):
            return super()._scheme(sections)
        return {
            "_target_": "lightning_modules.rotary.mrope.TimedMRope",
            "tokens_per_second": float(self.read().vision_config.tokens_per_second),
            "sections": sections,
        }


class Qwen2VLTextImporter(Importer):
    """Writes the text model as a plain Qwen2 for `model.llm.source`.

    With `rotary=mrope` and its sections, it runs as in Qwen2-VL.
    """

    name = "qwen2_vl_text"
    architecture = "Qwen2VLForConditionalGeneration"
    rules = (
        Rule(r"model\.language_model\.", "model."),
        Rule(r"model\.(?!visual\.)", "model."),
        Rule(r"lm_head\.", "lm_head."),
    )

    def stages(self) -> dict[str, dict[str, Any]]:
        llm, sections = text_model(Qwen2VLConfig.from_dict(self.config))
        return {
            "rotary": {"_target_": "lightning_modules.rotary.mrope.MRope", "sections": sections},
            "llm": causal_lm(llm),
        }

    def on_purpose(self) -> list[str]:
        return [*super().on_purpose(), "visual.*", "model.visual.*"]

    def build(self) -> PreTrainedModel:
        return build(self.stages()["llm"]).lm


def text_model(config: Any) -> tuple[Qwen2Config, list[int] | None]:
    """Returns the text model of a Qwen-VL config as a plain Qwen2, and its rotary sections."""
    text = config.text_config
    known = Qwen2Config().to_dict()
    fields = {key: value for key, value in text.to_dict().items() if key in known}
    rope = dict(text.rope_parameters)
    sections = rope.pop("mrope_section", None)
    fields |= {
        "model_type": "qwen2",
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    return Qwen2Config(**fields), sections
