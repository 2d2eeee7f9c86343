"""Code shared by the encoders that run transformers' towers on square frames."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor
from transformers import PretrainedConfig

from datamodules.batch import Grid, Visual
from lightning_modules.spec import spec_of
from lightning_modules.tokens import VisualTokens

from .base import Encoder


class FrameEncoder(Encoder):
    """An encoder whose tower reads square frames of one size; a token is a patch of a frame.

    Attributes that a subclass sets:
        image_size: side of a frame in pixels.
        grid: rows and columns of patches in a frame.
    """

    image_size: int
    grid: tuple[int, int]

    @abstractmethod
    def encode(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        """Returns the features of the patches of each frame.

        `frame_counts` holds the number of frames of each visual; they sum to n.
        """

    def forward(self, visuals: Sequence[Visual]) -> list[VisualTokens]:
        if not visuals:
            return []
        patches = self.encode(*self.stack(visuals)).unflatten(1, self.grid)  # n p d -> n h w d
        return on_frames(patches, visuals)

    def stack(self, visuals: Sequence[Visual]) -> tuple[Num[Tensor, "n c h w"], list[int]]:
        """Returns the frames of all visuals, and the number of frames of each.

        Raises:
            ValueError: the frames do not have the size that the tower reads.
        """
        side = self.image_size
        for visual in visuals:
            if (size := visual.frames.shape[-2:]) != (side, side):
                raise ValueError(
                    f"frames of {size[0]} x {size[1]} pixels, but the encoder reads {side} x "
                    f"{side}: set data.frames.image_size to {side}"
                )
        frames = [visual.frames for visual in visuals]
        return frames[0] if len(frames) == 1 else torch.cat(frames), list(map(len, frames))

    def extent(self, frames: int, height: int, width: int) -> Grid:
        return Grid(frames, *self.grid)

    def blank(self) -> Visual:
        return Visual(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8))


def on_frames(features: Float[Tensor, "n h w d"], visuals: Sequence[Visual]) -> list[VisualTokens]:
    """Returns the tokens of each visual, given the features of all frames.

    A time step is one frame, shown when the frame is.
    """
    counts = [len(visual.frames) for visual in visuals]
    return [
        VisualTokens.on_grid(
            part,
            seconds=visual.info.seconds,
            draw=visual.info.draw,
            continues=visual.info.continues,
        )
        for part, visual in zip(features.split(counts), visuals, strict=True)
    ]


def check_given(source: str | None, config: Mapping[str, Any] | None) -> None:
    """Checks that exactly one of `source` and `config` is given.

    Raises:
        ValueError: neither or both are given.
    """
    if (source is None) == (config is None):
        raise ValueError("set either model.encoder.source or model.encoder.config, not both")


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


def load_whole(model: Any, source: str | None, name: str, **options: Any) -> Any:
    """Returns `model.from_pretrained(source, **options)`.

    Args:
        name: the model's name in the error message.

    Raises:
        ValueError: `source` lacks some of the weights.
    """
    loaded, report = model.from_pretrained(
        source, dtype=torch.get_default_dtype(), output_loading_info=True, **options
    )
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{source} lacks {len(missing)} of {name}'s weights, such as {min(missing)}: set "
            f"model.encoder.source to a whole {name} model"
        )
    return loaded


def embed_patches(embeddings: Any, frames: Float[Tensor, "n c h w"]) -> Float[Tensor, "n p d"]:
    """Returns the embedding of each patch, without positions."""
    weight = embeddings.patch_embedding.weight
    return embeddings.patch_embedding(frames.to(weight.dtype)).flatten(2).mT


def layers_before(feature_layer: int, depth: int) -> int:
    """Returns the number of layers before hidden state `feature_layer`, in a tower of `depth`."""
    count = feature_layer if feature_layer >= 0 else depth + 1 + feature_layer
    if not 0 <= count <= depth:
        raise ValueError(
            f"model.encoder.feature_layer {feature_layer} is not in a tower of {depth} layers: "
            f"choose {-depth - 1} to {depth}"
        )
    return count


def tower_spec(encoder: Any, config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Returns the spec of an encoder that runs a tower of this config.

    Args:
        more: arguments that not all such encoders take.
    """
    return spec_of(
        encoder,
        config=config,
        feature_layer=encoder.feature_layer,
        image_size=encoder.image_size,
        attention=encoder.attention,
        chunk_frames=encoder.chunk_frames,
        **more,
    )


def tower_sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the config fields that rebuild a tower, without transformers' other metadata."""
    notes = ("transformers_version", "model_type", "architectures", "dtype", "projection_dim")
    return {k: v for k, v in config.to_diff_dict().items() if k not in notes}
