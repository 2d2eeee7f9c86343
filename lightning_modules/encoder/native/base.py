"""The encoders that run Qwen-VL's towers: visuals of any size, packed through the tower."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from datamodules.batch import Grid, Visual
from lightning_modules.encoder.base import Encoder
from lightning_modules.encoder.chunks import check_chunk_frames, needs_gradient, run_chunks
from lightning_modules.private.transformers import attention_of
from lightning_modules.spec import set_attention, spec_of
from lightning_modules.tokens import VisualTokens

from .patches import PatchEmbedding, PatchSizes, Steps, cut_patches, places, split_steps

#: Side of the blank visual in tokens. It has many divisors, so that the windows of poolers fit.
_BLANK_SIDE = 12

#: Base of the tower's rotary frequencies.
_THETA = 10_000.0


class Turn:
    """Cosines and sines of rotary angles, in float32.

    FSDP2 casts the tensors in the arguments of a block, also those in tuples. It does not look into
    this class, so the angles keep their precision.
    """

    def __init__(self, angles: Float[Tensor, "p d"]):
        self.cos, self.sin = angles.cos(), angles.sin()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cos, self.sin))


class Packed(NamedTuple):
    """What the blocks read beside the patches of a chunk."""

    turn: Turn
    lengths: list[Any]  # arguments for the lengths of the sequences, for each kind of block


class NativeEncoder(Encoder):
    """Runs a tower of Qwen-VL on visuals of any size, each with its own number of tokens.

    A token is made of `merge` x `merge` patches, and a time step of two frames. The visuals of a
    batch are packed: the blocks read them one after the other, without padding, and attention stays
    inside a time step.

    The encoder ends in the middle of the tower's merger: after its norm, and after the patches of a
    token are joined. The merger's two linears are the model's projector, so any pooler can stand
    between them, and `tuning=projector` means the same as behind other encoders.

    Args:
        tower: transformers' tower.
        factor: height and width of frames are multiples of this number of pixels; None: not checked
            against the tower.
    """

    per_frame = True

    def __init__(self, tower: Any, attention: str, chunk_frames: int | None, factor: int | None):
        super().__init__()
        set_attention(tower, "encoder", attention)
        sizes = tower.config
        self.cut = PatchSizes(sizes.temporal_patch_size, sizes.patch_size, sizes.spatial_merge_size)
        self.factor = self.cut.side * self.cut.merge
        if factor not in (None, self.factor):
            raise ValueError(
                f"model.encoder.factor is {factor}, but the tower reads frames in multiples of "
                f"{self.factor} pixels: set it to that"
            )
        self.attention = attention
        self.chunk_frames = check_chunk_frames(chunk_frames)
        self.frames_per_step = self.cut.frames
        self.width = self.projector_width = tower.merger.hidden_size
        self.head_size = tower.blocks[0].attn.head_dim
        tower.merger.mlp = nn.Identity()  # the projector
        tower.patch_embed.proj = PatchEmbedding.like(tower.patch_embed.proj)
        # Its frequencies are in a buffer that no checkpoint stores.
        tower.rotary_pos_emb = nn.Identity()
        self.tower = tower

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns the sizes that rebuild the tower."""

    def extent(self, frames: int, height: int, width: int) -> Grid:
        """Returns the grid of tokens.

        Raises:
            ValueError: height or width is not a multiple of `factor`.
        """
        if height % self.factor or width % self.factor or not height * width:
            raise ValueError(
                f"frames of {height} x {width} pixels, but the encoder reads heights and widths "
                f"that are multiples of {self.factor}: set data/frames=native"
            )
        return Grid(-(-frames // self.cut.frames), height // self.factor, width // self.factor)

    def reads(self, frames: int, height: int, width: int) -> tuple[int, int | float]:
        extent = self.extent(frames, height, width)
        return extent.t * self._patches(extent), self.attended(extent.h, extent.w)

    def attended(self, height: int, width: int) -> int | float:
        """Returns how many patches a patch attends to, as a mean over patches and blocks.

        Args:
            height, width: rows and columns of tokens.
        """
        return height * width * self.cut.merge**2

    def blank(self) -> Visual:
        side = _BLANK_SIDE * self.factor
        return Visual(torch.zeros(1, 3, side, side, dtype=torch.uint8))

    def blocks(self) -> list[nn.Module]:
        return list(self.tower.blocks)

    def to_spec(self) -> dict:
        return spec_of(
            self,
            config=self.config,
            attention=self.attention,
            chunk_frames=self.chunk_frames,
            factor=self.factor,
        )

    def forward(self, visuals: Sequence[Visual]) -> list[VisualTokens]:
        """Returns the tokens of each visual. A time step is shown when its first frame is."""
        if not visuals:
            return []
        extents = [self.extent(len(v.frames), *v.frames.shape[-2:]) for v in visuals]
        features = self._run(visuals, extents).split([extent.size for extent in extents])
        return [
            VisualTokens.on_grid(
                part.view(*extent, -1),
                seconds=visual.info.seconds and visual.info.seconds[:: self.cut.frames],
                draw=visual.info.draw,
                continues=visual.info.continues,
            )
            for part, extent, visual in zip(features, extents, visuals, strict=True)
        ]

    def _run(self, visuals: Sequence[Visual], extents: Sequence[Grid]) -> Float[Tensor, "l d"]:
        """Returns the joined patches of each token, visual after visual."""
        tower, norm = self.tower, self.tower.merger.ln_q
        reads = [tower.patch_embed, *tower.blocks, norm]
        asked = needs_gradient([visual.frames for visual in visuals], reads)
        at_once = None if asked or self.chunk_frames is None else self.chunk_frames
        size = at_once and max(1, at_once // self.cut.frames)
        chunks = split_steps([extent.t for extent in extents], size)
        counts = [sum(self._patches(extents[s.visual]) * s.count for s in c) for c in chunks]
        device = visuals[0].frames.device
        kinds = {block: self.kind_of(number) for number, block in enumerate(tower.blocks)}
        packed: dict[Any, Packed] = {}  # by the sizes in a chunk; those of one video are the same

        def start(number: int) -> Tensor:
            parts = [self._cut(visuals[s.visual], extents[s.visual], s) for s in chunks[number]]
            return tower.patch_embed.proj(parts[0] if len(parts) == 1 else torch.cat(parts))

        def call(layer: nn.Module, hidden: Tensor, number: int) -> Tensor:
            sizes = tuple((s.count, *extents[s.visual][1:]) for s in chunks[number])
            if layer is norm:
                return self._restore(layer(hidden), sizes)
            if sizes not in packed:
                packed[sizes] = self._pack(sizes, device)
            beside = packed[sizes]
            lengths = beside.lengths[kinds[layer]]
            return layer(hidden, position_embeddings=beside.turn, **lengths)

        hidden = run_chunks(start, counts, [*tower.blocks, norm], call, asked)
        return hidden.view(-1, self.width)

    def kind_of(self, number: int) -> int:
        """Returns which of the lengths of `_lengths` the block with this number reads."""
        return 0

    def _cut(self, visual: Visual, extent: Grid, steps: Steps) -> Float[Tensor, "p pixels"]:
        """Returns the patches of some time steps, in the order in which the blocks read them."""
        return cut_patches(visual.frames, steps, self.cut)

    def _restore(
        self, patches: Float[Tensor, "p d"], sizes: Sequence[tuple[int, int, int]]
    ) -> Float[Tensor, "p d"]:
        """Returns patches in the order of `cut_patches`, from that of the blocks.

        Args:
            sizes: of the time steps: (count, rows, columns of tokens).
        """
        return patches

    def _lengths(self, height: int, width: int) -> list[list[int]]:
        """Returns the lengths in patches of the sequences of a step, for each kind of block."""
        return [[height * width * self.cut.merge**2]]

    def _places(self, height: int, width: int, device: torch.device) -> Float[Tensor, "2 p"]:
        """Returns row and column of the patches of a step, in the order of the blocks."""
        return torch.stack(places(height, width, self.cut.merge, device))

    def _pack(self, sizes: Sequence[tuple[int, int, int]], device: torch.device) -> Packed:
        """Returns what the blocks read beside these steps: (count, rows, columns of tokens)."""
        half = self.head_size // 2
        steps = torch.arange(0, half, 2, dtype=torch.float32, device=device)
        frequencies = _THETA ** (-steps / half)
        parts = []
        for count, height, width in sizes:
            angles = self._places(height, width, device)[..., None] * frequencies  # 2 p f
            parts.append(angles.movedim(0, 1).flatten(1).repeat(count, 2))  # p d
        of_steps = [self._lengths(height, width) for _, height, width in sizes]
        lengths = [
            [length for size, own in zip(sizes, kind, strict=True) for length in own * size[0]]
            for kind in zip(*of_steps, strict=True)
        ]
        return Packed(Turn(torch.cat(parts)), [self._bounds(each, device) for each in lengths])

    def _bounds(self, lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Returns the bounds of the sequences, as a block takes them.

        Only flash kernels read them on the GPU. With other kernels, the blocks turn them into a
        list, which must not wait for the GPU.
        """
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        if not is_flash_attention_requested(
            requested_attention_implementation=attention_of(self.tower.config)
        ):
            return {"cu_seqlens": bounds}
        return {"cu_seqlens": bounds.to(device, non_blocking=True), "max_seqlen": max(lengths)}

    def _patches(self, extent: Grid) -> int:
        """Returns the patches of a time step."""
        return extent.h * extent.w * self.cut.merge**2
