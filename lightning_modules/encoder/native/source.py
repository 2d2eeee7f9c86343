"""Builds a tower of Qwen-VL from its sizes, or reads it from a whole checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lightning_modules.encoder.towers import check_given, load_whole, tower_sizes

#: The tower in a checkpoint, with the names of transformers 4.x or 5.x.
VISUAL = r"^(model\.)?visual\."


def load_tower(tower: Any, kind: str, source: str | None, config: Mapping[str, Any] | None) -> Any:
    """Returns the tower in `source`, or a new one with the sizes in `config`.

    Args:
        tower: transformers' class.
        kind: `model_type` of a whole model with such a tower.

    Raises:
        ValueError: both or neither are given, or `source` holds no such tower.
    """
    check_given(source, config)
    if source is None:
        return tower(tower.config_class(**(config or {})))
    whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if whole.model_type != kind:
        raise ValueError(
            f"{source} is a {whole.model_type}, not a {kind}: set model.encoder.source to a whole "
            f"{kind} model, or choose another encoder"
        )
    # The LLM beside the tower has no place in it; without this, transformers lists its names.
    quiet = type(tower.__name__, (tower,), {"_keys_to_ignore_on_load_unexpected": [r"."]})
    loaded = load_whole(quiet, source, kind, config=whole.vision_config, key_mapping={VISUAL: ""})
    loaded.__class__ = tower
    return loaded


def vision_sizes(
    config: PretrainedConfig, kind: type[PretrainedConfig], without: Sequence[str]
) -> dict[str, Any]:
    """Returns the fields of a tower's config that `kind` knows, except those in `without`."""
    known = kind().to_dict().keys() - set(without)
    return {key: value for key, value in tower_sizes(config).items() if key in known}
