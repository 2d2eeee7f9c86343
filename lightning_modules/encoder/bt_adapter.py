"""BT-Adapter: a second branch beside the last CLIP layers, in which frames attend to each other.

Liu et al., "BT-Adapter: Video Conversation is Feasible Without Video Instruction Tuning" (CVPR
2024), as PPLLaVA uses it (ppllava/models/clip_btadapter.py). Stochastic depth is left out; the
published code applies it in training only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer


class BranchState(NamedTuple):
    """The branch's state between two layers, for visuals of the same length."""

    token: Float[Tensor, "v d"]  # one class token for the whole visual
    patches: Float[Tensor, "v t p d"]


class TemporalLayer(GradientCheckpointingLayer):
    """A layer in which each patch attends to the patches at the same place in all frames."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.zeros_(self.out.weight)  # an untrained branch does not mix frames
        nn.init.zeros_(self.out.bias)

    def forward(self, patches: Float[Tensor, "v t p d"]) -> Float[Tensor, "v t p d"]:
        v = patches.shape[0]
        tracks = rearrange(patches, "v t p d -> (v p) t d")
        mixed = self.out(self.self_attn(self.layer_norm(tracks))[0])
        return patches + rearrange(mixed, "(v p) t d -> v t p d", v=v)


class SpatialLayer(CLIPEncoderLayer):
    """A CLIP layer that runs within each frame, with one class token shared by all frames."""

    def forward(self, state: BranchState) -> BranchState:  # pyright: ignore[reportIncompatibleMethodOverride]
        token, patches = state
        t = patches.shape[1]
        frames = torch.cat([repeat(token, "v d -> v t 1 d", t=t), patches], dim=2)
        flat = self.layer_norm1(frames.flatten(0, 1))  # (v t) 1+p d
        seen = self.self_attn(flat)[0].unflatten(0, (-1, t))
        token, patches = token + seen[:, :, 0].mean(1), patches + seen[:, :, 1:]
        return BranchState(
            token + self.mlp(self.layer_norm2(token)), patches + self.mlp(self.layer_norm2(patches))
        )


class BTAdapter(nn.Module):
    """Runs the last layers of a CLIP tower together with the branch beside them.

    Args:
        config: the tower's config.
        trunk: the tower's layers beside the branch; the spatial layers start as copies of them.
        max_frames: number of temporal positions; no visual may be longer.
    """

    def __init__(self, config: CLIPVisionConfig, trunk: Sequence[nn.Module], max_frames: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.time_positions = nn.Embedding(max_frames, config.hidden_size)
        nn.init.normal_(self.time_positions.weight, std=config.initializer_range)
        self.temporal = nn.ModuleList(TemporalLayer(config) for _ in trunk)
        self.spatial = nn.ModuleList(SpatialLayer(config) for _ in trunk)
        for copy, layer in zip(self.spatial, trunk, strict=True):
            copy.load_state_dict(layer.state_dict())

    def forward(
        self,
        hidden: Float[Tensor, "n s d"],
        frame_counts: list[int],
        trunk: Sequence[nn.Module],
        positions: Float[Tensor, "s d"],
    ) -> Float[Tensor, "n s d"]:
        """Returns the trunk's class token and the mean of the trunk's and the branch's patches.

        Axis s holds the class token and then the p patches; `positions` is the tower's own position
        table. Visuals of the same length run through the branch together.

        Raises:
            ValueError: a visual has more frames than there are temporal positions.
        """
        longest = max(frame_counts)
        if longest > self.time_positions.num_embeddings:
            raise ValueError(
                f"a visual of {longest} frames, but BT-Adapter has "
                f"{self.time_positions.num_embeddings} temporal positions: sample fewer frames or "
                "raise model.encoder.bt_adapter.max_frames"
            )
        groups = _frames_by_length(frame_counts, hidden.device)
        states: list[BranchState | None] = [None] * len(groups)
        for layer, temporal, spatial in zip(trunk, self.temporal, self.spatial, strict=True):
            hidden = layer(hidden, None)
            for i, group in enumerate(groups):
                token, patches = self._join(states[i], hidden[group], positions)
                states[i] = spatial(BranchState(token, temporal(patches)))
        branch = torch.cat([state.patches.flatten(0, 1) for state in states if state is not None])
        branch = branch[torch.cat([group.flatten() for group in groups]).argsort()]
        return torch.cat([hidden[:, :1], (hidden[:, 1:] + branch) / 2], dim=1)

    def _join(
        self,
        state: BranchState | None,
        hidden: Float[Tensor, "v t s d"],
        positions: Float[Tensor, "s d"],
    ) -> BranchState:
        """Returns the branch's next input: state plus trunk output, or the first state."""
        token, patches = hidden[:, :, 0].mean(1), hidden[:, :, 1:]
        if state is not None:
            return BranchState(state.token + token, state.patches + patches)
        time = self.time_positions.weight[: hidden.shape[1], None]  # t 1 d
        own = self.class_token + positions[0]
        return BranchState((token + own) / 2, patches + positions[1:] + time)


def _frames_by_length(frame_counts: list[int], device: torch.device) -> list[Int[Tensor, "v t"]]:
    """Returns the frame indices of the visuals, one tensor for each distinct length."""
    starts: dict[int, list[int]] = {}
    position = 0
    for count in frame_counts:
        starts.setdefault(count, []).append(position)
        position += count
    return [
        torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)
        for count, first in starts.items()
    ]
