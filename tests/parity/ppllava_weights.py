"""Maps PPLLaVA's sizes and parameter names to our components, to compare the numbers."""

import re
from typing import Any, NamedTuple

from torch import Tensor

from lightning_modules.encoder.clip import ClipEncoder
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.projector import Projector

KEPT_POSITIONS = 20  # fixed in the published code, as is the factor
FACTOR = 4

TOWER = r"vision_tower\.vision_model\."
TEMPORAL = rf"{TOWER}btadapter_T_layers\.(\d+)\."
GUIDE = r"multi_modal_projector\.clip_"

#: Published name -> ours, first match. Layers that our tower does not keep are removed later.
ENCODER_NAMES = [
    (rf"{TEMPORAL}layer_norm1", r"adapter.temporal.\1.layer_norm"),
    (rf"{TEMPORAL}temporal_fc", r"adapter.temporal.\1.out"),
    (TEMPORAL, r"adapter.temporal.\1."),
    (rf"{TOWER}btadapter_S_layers", "adapter.spatial"),
    (rf"{TOWER}btadapter_cls_token", "adapter.class_token"),
    (rf"{TOWER}btadapter_time_embed", "adapter.time_positions"),
    (rf"{TOWER}post_layernorm", "unused."),  # of the tower's own pooled output
    (TOWER, "vision."),
    (rf"{GUIDE}visual_ln", "vision.post_layernorm"),
    (rf"{GUIDE}visual_projection", "visual_projection"),
    (rf"{GUIDE}text_projection", "text_projection"),
    (rf"{GUIDE}text_model", "text"),
]


class Stages(NamedTuple):
    encoder: ClipEncoder
    pooler: PromptGuidedPooler
    projector: Projector


def build_stages(spec: dict[str, Any], weights: dict[str, Tensor]) -> Stages:
    """Returns encoder, pooler and projector of one golden pair, with its weights, in eval mode."""
    encoder = ClipEncoder(**encoder_arguments(spec))
    pooler = PromptGuidedPooler(**pooler_arguments(spec))
    projector = Projector(spec["clip_vision"]["hidden_size"], spec["llm"]["hidden_size"])
    encoder.load_state_dict(encoder_weights(weights, encoder))
    pooler.load_state_dict(pooler_weights(weights))
    projector.load_state_dict(projector_weights(weights))
    return Stages(encoder.eval(), pooler.eval(), projector.eval())


def encoder_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    text, layers = spec["clip_text"], spec["clip_vision"]["num_hidden_layers"]
    layer = spec["vision_feature_layer"]
    kept = layer if layer >= 0 else layers + 1 + layer
    others = text.get("max_position_embeddings", 77) - KEPT_POSITIONS
    # An adapter that starts after the features never reaches them.
    reaches = spec["bt_adapter"] and layers - spec["bt_adapter_depth"] < kept
    return {
        "config": {
            "vision": spec["clip_vision"],
            "text": text,
            "projection_dim": spec["projection_dim"],
        },
        "feature_layer": layer,
        "context_length": KEPT_POSITIONS + FACTOR * others if spec["extended_context"] else None,
        "kept_positions": KEPT_POSITIONS,
        "bt_adapter": {"depth": spec["bt_adapter_depth"], "max_frames": spec["max_T"]}
        if reaches
        else None,
    }


def pooler_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "kernel": spec["pooling_kernel"],
        "stride": spec["pooling_stride"],
        "output_size": spec["output_shape"],
        "image_kernel": spec["image_pooling_kernel"],
        "crop": True,
        "temperature": spec["temperature"],
        "double_softmax": True,
    }


def encoder_weights(weights: dict[str, Tensor], encoder: ClipEncoder) -> dict[str, Tensor]:
    """Complete for `encoder`. Of the published weights, only what it does not keep is left out."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for pattern, replacement in ENCODER_NAMES:
            renamed, found = re.subn(f"^{pattern}", replacement, name)
            if found:
                ours[renamed] = tensor
                break
    ours = {name: tensor for name, tensor in ours.items() if _is_kept(name, encoder)}
    if "adapter.class_token" in ours:
        ours["adapter.class_token"] = ours["adapter.class_token"].flatten()
    kept_table = ours.pop("text.embeddings.position_embedding", None)
    if kept_table is not None:  # the extended context comes as two tables, each used in part
        trained_table = ours.pop("text.embeddings.position_embedding_res")
        ours["text.embeddings.position_embedding.kept"] = kept_table[:KEPT_POSITIONS]
        ours["text.embeddings.position_embedding.stretched"] = trained_table[KEPT_POSITIONS:]
    return ours


def _is_kept(name: str, encoder: ClipEncoder) -> bool:
    if name.startswith("unused.") or (name.startswith("adapter.") and encoder.adapter is None):
        return False
    layer = re.match(r"(vision\.encoder\.layers|adapter\.spatial|adapter\.temporal)\.(\d+)\.", name)
    return layer is None or int(layer[2]) < len(encoder.get_submodule(layer[1]))  # type: ignore[arg-type]


def pooler_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logit_scale": weights["multi_modal_projector.logit_scale"].reshape(1)}


def projector_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "multi_modal_projector."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(f"{prefix}linear_")
    }


def llm_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a transformers LlamaForCausalLM."""
    prefix = "language_model."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }
