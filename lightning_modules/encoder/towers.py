"""Helpers shared by the encoders that use transformers' vision and text towers."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig


def check_given(source: str | None, config: Mapping[str, Any] | None) -> None:
    """Checks that exactly one of `source` and `config` is given.

    Raises:
        ValueError: neither or both are given.
    """
    if (source is None) == (config is None):
        raise ValueError("set one of model.encoder.source and model.encoder.config, and only one")


def check_image_size(asked: int | None, side: Any) -> None:
    """Checks that the configured frame size is None or the size that the tower reads.

    Raises:
        ValueError: the sizes differ.
    """
    if asked not in (None, side):
        raise ValueError(
            f"model.encoder.image_size is {asked}, but the tower reads frames of "
            f"{side} pixels: set it to that"
        )


def load_whole(model: Any, source: str | None, name: str) -> Any:
    """Returns `model.from_pretrained(source)`; `name` is the model's name in the error message.

    Raises:
        ValueError: `source` lacks some of the weights.
    """
    loaded, report = model.from_pretrained(
        source, dtype=torch.get_default_dtype(), output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{source} lacks {len(missing)} of {name}'s weights, such as {min(missing)}: set "
            f"model.encoder.source to a whole {name} model"
        )
    return loaded


def embed_patches(
    embeddings: Any, frames: Float[Tensor, "n c h w"], side: Any
) -> Float[Tensor, "n p d"]:
    """Returns the embedding of each patch, without positions.

    Raises:
        ValueError: the frames do not have the size that the tower reads.
    """
    if frames.shape[-2:] != (side, side):
        raise ValueError(
            f"frames of {frames.shape[-2]} x {frames.shape[-1]} pixels, but the encoder reads "
            f"{side} x {side}: set data.frames.image_size to {side}"
        )
    weight = embeddings.patch_embedding.weight
    return embeddings.patch_embedding(frames.to(weight.dtype)).flatten(2).mT


def layers_before(feature_layer: int, depth: int) -> int:
    """Returns the number of layers before hidden state `feature_layer`, in a tower of `depth`."""
    count = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 0 <= count <= depth:
        raise ValueError(
            f"model.encoder.feature_layer {feature_layer} is not in a tower of {depth} layers: "
            f"take {-depth - 1} to {depth}"
        )
    return count


def tower_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the config fields that rebuild a tower, without transformers' other metadata."""
    notes = ("transformers_version", "model_type", "architectures", "dtype", "projection_dim")
    return {k: v for k, v in config.to_diff_dict().items() if k not in notes}
