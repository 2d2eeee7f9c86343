"""The contract of a rotary scheme: row -> positions -> cos, sin.

row            [3, Layout, 2]      3 text tokens, a visual, 2 text tokens
  |  RotaryScheme.positions: `place` for each visual
  v
positions      (a l)               one position on each axis; a = `num_axes`
  |  batch_positions: adds row 0, which counts tokens; `splice/packing.py` makes padded rows
  v
position_ids   (1 + a, b, l)       goes to the decoder
  |  hook of CausalLM: row 0 -> masks and KV cache; rows 1 to a -> RotaryEmbedding
  v
angle          (b l f)             position on the axis of each frequency (`axes`) * frequency
  |  float32 at every precision; once per forward   (`scale` may change the frequencies)
  v
cos, sin       (b l d)             every layer turns its queries and keys by them
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lightning_modules.rotary.angles import Angles
from lightning_modules.rotary.scaling.base import Scaling
from lightning_modules.tokens import Layout, Row

TIME, HEIGHT, WIDTH = range(3)

#: The axis of a frequency that does not turn: it reads position 0 everywhere.
STILL = -1


class RotaryScheme(ABC):
    """Computes positions for text and visuals in any order.

    Attributes:
        num_axes: a, the number of axes that positions have.
        text_step: distance between two text tokens, on all axes.
        draws: whether positions depend on the `draw` of a visual, so that they are random in
            training.
        scaling: changes the frequencies for rows that are longer than in training; None: does not.
    """

    num_axes: int = 3
    text_step: float = 1.0
    draws: bool = False
    scaling: Scaling | None = None

    @abstractmethod
    def place(self, visual: Layout, start: float) -> tuple[Float[Tensor, "a l"], float]:
        """Returns the positions of a visual that begins at `start`, and those of the next text.

        The second result is the position of the first text token after the visual. It depends only
        on sizes (`extent`, `seconds`), not on `coordinates`, so it is the same whatever a pooler
        keeps.
        """

    @abstractmethod
    def axes(self, num_frequencies: int) -> Int[Tensor, " f"]:
        """Returns the axis that each frequency reads, fastest first; STILL: it does not turn.

        Raises:
            ValueError: the scheme cannot distribute `num_frequencies` over its axes.
        """

    def scale(
        self, frequencies: Float[Tensor, " f"], axes: Int[Tensor, " f"]
    ) -> Float[Tensor, " f"]:
        """Returns the frequencies (radians per position) to use instead of the LLM's own."""
        return frequencies

    def positions(self, row: Row) -> tuple[Float[Tensor, "a l"], float]:
        """Returns the positions of one row, and the position of the next text token.

        A scheme that must see more of the row than one visual overrides this method.
        """
        start, parts = 0.0, [torch.zeros(self.num_axes, 0, dtype=torch.float32)]
        for segment in row:
            if isinstance(segment, Layout):
                part, start = self.place(segment, start)
            else:
                part = start + self.text_step * torch.arange(segment).float()
                part = part.expand(self.num_axes, -1)
                start += self.text_step * segment
            parts.append(part)
        device = next((s.coordinates.device for s in row if isinstance(s, Layout)), None)
        return torch.cat([part.to(device) for part in parts], dim=1), start

    def batch_positions(
        self, rows: Sequence[Row], padding_side: str = "right"
    ) -> Float[Tensor, "a1 b l"]:
        """Returns `position_ids` for transformers' decoders: row 0 counts tokens, for masks.

        The other rows are the axes, divided by `text_step`, so that text advances by 1.
        """
        placed = [self.positions(row)[0] / self.text_step for row in rows]
        width = max(axes.shape[1] for axes in placed)
        batch = placed[0].new_zeros(1 + self.num_axes, len(placed), width)
        for i, axes in enumerate(placed):
            length = axes.shape[1]
            first = width - length if padding_side == "left" else 0
            batch[0, i, first : first + length] = torch.arange(length)
            batch[1:, i, first : first + length] = axes
        return batch

    def batch_following(self, rows: Sequence[Row]) -> Float[Tensor, " b"]:
        """Returns the position of the next text token of each row, as in `batch_positions`.

        After text it is the last position + 1. After a visual the scheme decides.
        """
        # float32 by name: in bf16-true the default dtype is bfloat16, and 649 would be 648.
        following = [self.positions(row)[1] for row in rows]
        return torch.tensor(following, dtype=torch.float32) / self.text_step


class RotaryEmbedding(nn.Module):
    """Replaces the rotary module of a transformers decoder, for all its layers at once.

    The frequencies, their scaling (`rope_parameters`: linear, dynamic, YaRN, …) and the channel
    order stay the LLM's own. The scheme decides which positions the frequencies multiply. The
    module keeps no tensors, because they would be cast to bfloat16 or left on the meta device. All
    arithmetic is float32; the result is cast at the end.

    Raises:
        ValueError: on text alone, it would differ from `original`, or the scheme cannot distribute
            the frequencies over its axes.
    """

    def __init__(self, scheme: RotaryScheme, original: Any):
        super().__init__()
        self.scheme = scheme
        self.angles = Angles(original)
        #: The positions on the axes, set by the LLM for the duration of one forward.
        self.axis_positions: Float[Tensor, "a b l"] | None = None
        #: The positions of the whole row, while the LLM reads it in parts; None: this is all of it.
        self.whole_row: Num[Tensor, "a1 b l2"] | None = None
        with torch.device("cpu"):  # even while a model is built on the meta device
            # Raises if the scheme or its scaling does not fit the frequencies.
            own = self.frequencies(torch.device("cpu"), 1)[0].float()
            axes = scheme.axes(own.numel())
            if scheme.scaling:
                scheme.scaling.scale(scheme.scale(own, axes), axes, 1.0)

    @property
    def num_axes(self) -> int:
        return self.scheme.num_axes

    @property
    def depends_on_length(self) -> bool:
        """Returns whether the frequencies depend on how long the row is."""
        scaling = self.scheme.scaling
        return self.angles.depends_on_length or bool(scaling and scaling.depends_on_length)

    def frequencies(
        self, device: torch.device, length: int | Int[Tensor, ""]
    ) -> tuple[Float[Tensor, " f"], float]:
        """Returns the LLM's own radians per position, fastest first, and YaRN's factor."""
        return self.angles.frequencies(device, length)

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "b l m"], position_ids: Num[Tensor, "b2 l"]
    ) -> tuple[Float[Tensor, "b2 l d"], Float[Tensor, "b2 l d"]]:
        """Returns cos and sin as the LLM's own module does, in the dtype of `x` or in float32.

        For text alone (`position_ids`), all axes have the same position.
        """
        positions = self.axis_positions
        if positions is None:
            positions = position_ids.float().expand(self.scheme.num_axes, -1, -1)
        radians, factor, axes = self._radians(x.device, position_ids, positions)
        still = torch.zeros_like(positions[:1])  # STILL is index -1: the last row
        by_axis = torch.cat([positions, still]).float().movedim(0, -1)  # b l a+1
        places = by_axis[..., axes] * self.scheme.text_step  # b l f
        return self.angles.turn(x, places, (radians, factor))

    def _radians(
        self, device: torch.device, tokens: Num[Tensor, "b2 l"], positions: Num[Tensor, "a b l"]
    ) -> tuple[Float[Tensor, " f"], float, Int[Tensor, " f"]]:
        """Returns the frequencies, the factor of cos and sin, and the axis of each frequency."""
        if self.whole_row is not None:
            tokens, positions = self.whole_row[0], self.whole_row[1:]
        # Only some scalings need the length; for the others, avoid waiting for the GPU.
        length = tokens.max() + 1 if self.angles.depends_on_length else 0
        own, factor = self.frequencies(device, length)
        axes = self.scheme.axes(own.numel()).to(device)
        radians = self.scheme.scale(own.float(), axes)
        if scaling := self.scheme.scaling:
            longest = positions.max().float() * self.scheme.text_step + 1
            radians = scaling.scale(radians, axes, longest if scaling.depends_on_length else 0.0)
            factor = factor * scaling.attention_factor
        return radians, factor, axes


def split_sections(sections: Sequence[int] | None, num_frequencies: int) -> tuple[int, int, int]:
    """Returns the number of frequencies for time, height and width; default 2 : 3 : 3 (Qwen2-VL).

    Raises:
        ValueError: the sections do not add up to `num_frequencies`, or without `sections` it is
            not divisible by 8.
    """
    if sections is None:
        if num_frequencies % 8:
            raise ValueError(
                f"{num_frequencies} rotary frequencies (head size {2 * num_frequencies}) cannot be "
                "split 2 : 3 : 3; set model.rotary.sections=[time,height,width] to three numbers "
                f"that add up to {num_frequencies}"
            )
        return num_frequencies // 4, 3 * num_frequencies // 8, 3 * num_frequencies // 8
    if len(sections) != 3 or sum(sections) != num_frequencies or min(sections) < 0:
        raise ValueError(
            f"model.rotary.sections={list(sections)} must be three numbers that add up to "
            f"{num_frequencies}, half of the head size {2 * num_frequencies}"
        )
    time, height, width = sections
    return time, height, width
