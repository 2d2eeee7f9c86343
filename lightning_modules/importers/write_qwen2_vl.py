"""Writes a model in the layout of Qwen2-VL, so that transformers' own class opens it."""

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from datamodules.common.spec import resolve
from lightning_modules.encoder.native.qwen2_vl import Qwen2VLEncoder
from lightning_modules.importers.match import Allowed, Rule, adopt, check, match
from lightning_modules.model import VideoLanguageModel
from lightning_modules.pooler.identity import IdentityPooler
from lightning_modules.rotary.base import RotaryScheme, split_sections
from lightning_modules.rotary.mrope import MRope
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.spec import PACKAGE, build

RULES = (
    Rule(r"projector\.linear_1\.", "model.visual.merger.mlp.0."),
    Rule(r"projector\.linear_2\.", "model.visual.merger.mlp.2."),
    Rule(r"encoder\.tower\.", "model.visual."),
    Rule(r"llm\.lm\.model\.", "model.language_model."),
    Rule(r"llm\.lm\.lm_head\.", "lm_head."),
)

#: Fields of the text model in a flat config.json, beside those of the rotary embedding.
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
    *("attention_dropout", "initializer_range", "use_cache", "tie_word_embeddings"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


#: The special tokens of Qwen2-VL's tokenizer, by the names of their ids in config.json.
SPECIAL_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}

#: Their ids in the published models.
_PUBLISHED = dict(zip(SPECIAL_TOKENS, range(151652, 151657), strict=True))


def check_writable(stages: Mapping[str, Any]) -> None:
    """Checks the specs of a model: whether transformers' class computes the same. Reads no weights.

    Args:
        stages: specs by component, as in `VideoLanguageModelConfig`.

    Raises:
        ValueError: a component of the model has no place in that class; the message names it.
    """
    kinds = {part: resolve(stages[part]["_target_"], PACKAGE) for part in ("encoder", "pooler")}
    llm = (stages["llm"].get("config") or {"model_type": "qwen2"}).get("model_type")
    scheme = build(stages["rotary"], RotaryScheme)
    reason = ""
    if kinds["encoder"] is not Qwen2VLEncoder:
        reason = f"the encoder {kinds['encoder'].__name__}"
    elif kinds["pooler"] is not IdentityPooler:
        reason = f"the pooler {kinds['pooler'].__name__}"
    elif stages.get("tiles"):
        reason = "images in tiles"
    elif llm != "qwen2":
        reason = f"an llm of the kind {llm} (its own is qwen2)"
    elif not _is_mrope(scheme):
        reason = f"the scheme {type(scheme).__name__} (its own is MRope)"
    if reason:
        raise ValueError(
            f"transformers' Qwen2-VL cannot express {reason}: leave out --layout, which writes a "
            "folder for VideoLanguageModel.from_pretrained"
        )


def write_qwen2_vl(
    model: VideoLanguageModel,
    folder: Path,
    tokens: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `config.json`, `preprocessor_config.json` and the weights.

    The names are those of transformers 4.45, and the config is flat as there. Versions 4.45 and 5.x
    read both.

    Args:
        model: LoRA must be merged into its weights.
        tokens: ids of the special tokens by the names in `config.json`; others have the ids of the
            published Qwen2-VL.
        dtype: of the weights; None: one that holds the dtypes of all weights.

    Raises:
        ValueError: transformers cannot express the model, or a token id is not in the vocabulary.
    """
    check_writable(vars(model.config))
    config = flat_config(model, tokens or {})
    with torch.device("meta"):
        theirs = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(deepcopy(config)))
    values = model.state_dict()
    found = match(values, theirs, RULES)
    check(found, Allowed(), "the model")
    kind = dtype or reduce(torch.promote_types, (value.dtype for value in values.values()))
    adopt(theirs, found.values, kind)
    theirs.save_pretrained(folder, max_shard_size="5GB")
    config["torch_dtype"] = str(kind).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(model), indent=2))


def flat_config(model: VideoLanguageModel, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Returns the content of `config.json`; raises errors as `write_qwen2_vl` does."""
    llm: Any = model.llm
    encoder: Any = model.encoder
    scheme: Any = model.rotary
    text = llm.lm.config
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sections = split_sections(scheme.sections, head_size // 2)
    scaling = {"type": "mrope"} if kind == "default" else {**rope, "rope_type": kind}
    vision = {**encoder.config, "model_type": "qwen2_vl", "hidden_size": text.hidden_size}
    vision.pop("rope_parameters", None)  # always the same; transformers 4.45 does not know it
    vision |= {"in_chans": 3, "spatial_patch_size": vision.get("patch_size", 14)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{name: getattr(text, name, None) for name in _TEXT},
        "rope_theta": theta,
        "rope_scaling": {**scaling, "mrope_section": list(sections)},
        "vision_config": vision,
        **_tokens(tokens, text.vocab_size),
    }


def _tokens(given: Mapping[str, int], vocabulary: int) -> dict[str, int]:
    ids = _PUBLISHED | {name: given[name] for name in SPECIAL_TOKENS.keys() & given.keys()}
    outside = [name for name, number in ids.items() if not 0 <= number < vocabulary]
    if outside:
        raise ValueError(
            f"{outside[0]}={ids[outside[0]]} is not in the llm's vocabulary of {vocabulary}: "
            f"Qwen2-VL's layout needs a tokenizer that has {', '.join(SPECIAL_TOKENS.values())}"
        )
    return ids


def _is_mrope(scheme: Any) -> bool:
    """Returns whether a scheme is M-RoPE, also by the settings of another one."""
    if type(scheme) is VideoRope:
        off = not (scheme.low_frequency_temporal or scheme.diagonal_layout)
        return off and scheme.temporal_spacing == 1
    return type(scheme) is MRope


def _preprocessor(model: VideoLanguageModel) -> dict[str, Any]:
    """Returns how frames become patches; the limits of pixels are those of transformers."""
    encoder: Any = model.encoder
    sizes = encoder.cut
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
        "patch_size": sizes.side,
        "merge_size": sizes.merge,
        "temporal_patch_size": sizes.frames,
    }
