"""Builds the outline of the largest sample of a recipe: its frames, tiles and words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from datamodules.batch import Tiles, Visual, VisualInfo
from datamodules.sample.outline import Outline
from datamodules.visuals.sizes import FramePolicy
from datamodules.visuals.tiles import check_grids
from experiments.private.torch import FakeTensorMode
from experiments.run.compose import build, plain
from lightning_modules.model import VideoLanguageModel


@dataclass(frozen=True)
class Largest:
    """The largest sample of a recipe.

    Args:
        videos, images: numbers of videos and images in the sample.
        frames: frames of each video.
        grids: (rows, columns) of tiles that an image may be cut into. If empty, an image is one
            frame.
        words: number of words. None means all tokens that visuals leave of `tokens`.
        tokens: tokens that the LLM reads, if known.
        labelled: share of the words with labels.
        policy: sizes of frames; None: the size that the encoder reads.
        picture: height and width in pixels of the videos and images, before they are resized.
    """

    videos: int
    images: int
    frames: int
    grids: Sequence[tuple[int, int]]
    words: int | None
    tokens: int | None
    labelled: float
    policy: FramePolicy | None = None
    picture: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, config: DictConfig) -> "Largest":
        """Reads the largest sample from a config.

        Raises:
            ValueError: the recipe does not say how many frames a video has.
        """
        words = None if config.tokens else OmegaConf.select(config, "data.conversation.max_length")
        grids = OmegaConf.select(config, "data.frames.tiles")
        return cls(
            config.videos,
            config.images,
            _frames(config) if config.videos else 0,
            check_grids(plain(grids)) if grids else (),
            words,
            config.tokens,
            config.labelled,
            _policy(config),
            tuple(config.picture),
        )

    def outline(self, network: Any, fake: FakeTensorMode) -> Outline:
        """Returns the outline of the sample. Its frames are fake tensors.

        Raises:
            ValueError: the visuals leave no room for words.
        """
        visual, words = self.visual_tokens(network), self.words
        if words is None:
            words = (self.tokens or 0) - visual
        if words < 2:
            raise ValueError(
                f"{self._described()} are {visual} tokens, but tokens={self.tokens}: set more of "
                "them, or choose a pooler that leaves less"
            )
        with fake:
            visuals = [
                Visual(
                    torch.empty(frames, 3, *self.frame_size(network, frames), dtype=torch.uint8),
                    VisualInfo(seconds=tuple(map(float, range(frames))), tiles=tiles),
                )
                for frames, tiles in self._visuals(*self.frame_size(network, 1))
            ]
        return Outline(visuals, words, max(1, round(self.labelled * words)))

    def visual_tokens(self, network: Any) -> int:
        """Returns the number of visual tokens that the LLM reads; 0 without an LLM."""
        if not isinstance(network, VideoLanguageModel):
            return 0
        visuals = self._visuals(*self.frame_size(network, 1))
        return sum(
            network.num_tokens(frames, *self.frame_size(network, frames), tiles)
            for frames, tiles in visuals
        )

    def frame_size(self, network: Any, frames: int) -> tuple[int, int]:
        """Returns the height and width in pixels of the frames of a visual."""
        if self.policy is None:
            height, width = network.encoder.blank().frames.shape[-2:]
            return height, width
        fit = self.policy.fit(*self.picture, frames, 0)
        return fit.height, fit.width

    @property
    def all_frames(self) -> int:
        return sum(frames for frames, _ in self._visuals(1, 1))

    def _visuals(self, height: int, width: int) -> Iterator[tuple[int, Tiles | None]]:
        """Yields (frames, tiles) of each visual. An image fills its tiles completely."""
        for _ in range(self.videos):
            yield self.frames, None
        for _ in range(self.images):
            if not self.grids:
                yield 1, None
                continue
            rows, columns = max(self.grids, key=lambda grid: grid[0] * grid[1])
            yield 1 + rows * columns, Tiles(rows, columns, rows * height, columns * width)

    def _described(self) -> str:
        videos = [f"{self.videos} x {self.frames} frames"] if self.videos else []
        images = [f"{self.images} images"] if self.images else []
        return " and ".join(videos + images) or "no visuals"


def _policy(config: DictConfig) -> FramePolicy | None:
    """Returns the policy of a recipe whose frames are not all of the encoder's one size."""
    spec = OmegaConf.select(config, "data.frames.policy")
    policy = build(spec, "data.frames.policy") if spec else None
    return None if policy is None or policy.takes_side else policy


def _frames(config: DictConfig) -> int:
    frames = config.frames
    keys = (
        "data.training.frames",
        *(f"data.frames.sampler.{n}" for n in ("num_frames", "max_frames")),
    )
    for key in keys:
        frames = OmegaConf.select(config, key) if frames is None else frames
    if frames is None:
        raise ValueError("the recipe does not say how many frames a video has: set frames=")
    return frames if isinstance(frames, int) else max(frames)
