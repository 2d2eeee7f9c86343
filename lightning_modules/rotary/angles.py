"""Computes cos and sin for text as an LLM does: with its own frequencies and channel order.

transformers' rotary modules share the arithmetic (position times frequency, then cos and sin), but
not the details. Llama's channels are two halves, Cohere's are pairs, and GPT-OSS has each frequency
once. Olmo2 keeps float32, others round. Gemma3 has different frequencies in some layers. `Angles`
finds these details by running the module itself, and refuses a module that it cannot reproduce.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

#: Rounding error of position * frequency in float32, relative to the position.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


class Angles:
    """Turns `position * frequency` into the cos and sin that an LLM's layers expect.

    It keeps no tensors, because they would be cast to bfloat16 or stay on the meta device with the
    model.

    Args:
        original: the LLM's own rotary module, with or without real buffers.

    Raises:
        ValueError: on text alone, these angles would differ from those of `original`.
    """

    def __init__(self, original: Any):
        name = type(original).__name__
        extra = list(signature(type(original).forward).parameters)[3:]  # after self, x, positions
        if extra:
            raise ValueError(
                f"model.llm: {name} uses different angles in different layers "
                f"({', '.join(extra)}), but a rotary scheme gives all layers the same: {_ADVICE}"
            )
        self.rope_type: str = getattr(original, "rope_type", "")
        known = {"default", *ROPE_INIT_FUNCTIONS}
        parts = ("config", "compute_default_rope_parameters")
        if self.rope_type not in known or not all(hasattr(original, part) for part in parts):
            raise ValueError(
                f"model.llm: the way in which {name} computes its angles is not supported here: "
                f"{_ADVICE}"
            )
        self.config: Any = original.config
        self._default_parameters = original.compute_default_rope_parameters
        self._arrange, self._rounds = _halves, True
        with torch.device("cpu"):  # even while a model is built on the meta device
            self._learn_from(type(original))

    def frequencies(
        self, device: torch.device, length: int | Int[Tensor, ""]
    ) -> tuple[Float[Tensor, " f"], float]:
        """Returns radians per position, fastest first, and YaRN's factor for cos and sin.

        Args:
            length: tokens of the longest row. Pass a tensor where the stock modules use one, so
                that `dynamic` rounds as they do.
        """
        with torch.device(device):
            if self.rope_type == "default":
                return self._default_parameters(self.config)
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, device, seq_len=length)

    @property
    def depends_on_length(self) -> bool:
        """Returns whether the frequencies depend on the longest row."""
        return self.rope_type in ("dynamic", "longrope")

    def turn(
        self, x: Tensor, places: Float[Tensor, "b l f"], frequencies: tuple[Tensor, float]
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]:
        """Returns cos and sin, computed in float32 and cast at the end.

        Args:
            x: only its dtype is used.
            places: the position that each frequency reads.
            frequencies: the result of `frequencies`.
        """
        radians, factor = frequencies
        angle = self._arrange(places * radians.float())  # b l d
        cos, sin = angle.cos() * factor, angle.sin() * factor
        return (cos.to(x.dtype), sin.to(x.dtype)) if self._rounds else (cos, sin)

    def _learn_from(self, kind: type[nn.Module]) -> None:
        """Finds the channel order and the dtype from new modules of this kind."""
        found = [_ask(kind(self.config), positions) for positions in self._rows()]
        half = torch.zeros(1, 1, dtype=torch.bfloat16)
        self._rounds = _ask(kind(self.config), torch.arange(2), half)[0].dtype == half.dtype
        differences = {}
        for arrange in (_halves, _pairs, _once):
            self._arrange = arrange
            differences[arrange] = self._difference(found)
            if differences[arrange] <= 1:
                return
        raise ValueError(
            f"model.llm: on text, the angles of {kind.__name__} differ from frequency times "
            f"position by {min(differences.values()):.2g} times the rounding: {_ADVICE}"
        )

    def _rows(self) -> Iterator[Int[Tensor, " l"]]:
        """Yields positions of short and long rows, so that every scaling has an effect."""
        scaling = self.config.rope_parameters or {}
        limits = {
            getattr(self.config, "max_position_embeddings", None) or 1,
            scaling.get("original_max_position_embeddings") or 1,
        }
        for length in sorted({9} | {n + more for n in limits for more in (0, 1, 2 * n)}):
            row = {0, 1, 2, 7, length // 2, length - 1}
            yield torch.tensor(sorted(n for n in row if n < length))

    def _difference(self, found: list[tuple[Tensor, Tensor]]) -> float:
        """Returns the largest difference to `found`, in units of the expected rounding error."""
        worst = 0.0
        for positions, theirs in zip(self._rows(), found, strict=True):
            frequencies = self.frequencies(torch.device("cpu"), positions.max() + 1)
            places = positions.float()[None, :, None]  # 1 l 1
            ours = self.turn(torch.zeros(1), places, frequencies)
            allowed = 1e-6 + _ROUNDING * positions.float()[:, None]
            for a, b in zip(ours, theirs, strict=True):
                if a.shape != b.shape or b.is_complex():
                    return float("inf")
                worst = max(worst, float(((a - b).abs() / allowed).max()))
        return worst


_ADVICE = "choose an llm of the Llama, Qwen or Cohere family"


def _ask(
    module: nn.Module, positions: Int[Tensor, " l"], x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of one row of text, computed by `module`."""
    x = torch.zeros(1, 1) if x is None else x
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        answer = module(x[None], positions[None])
    return answer if isinstance(answer, tuple) else (answer, answer)


def _halves(angle: Float[Tensor, "b l f"]) -> Float[Tensor, "b l d"]:
    """Arranges channels in Llama's order: all frequencies, then all again."""
    return torch.cat([angle, angle], dim=-1)


def _pairs(angle: Float[Tensor, "b l f"]) -> Float[Tensor, "b l d"]:
    """Arranges channels in Cohere's order: each frequency twice in a row."""
    return angle.repeat_interleave(2, dim=-1)


def _once(angle: Float[Tensor, "b l f"]) -> Float[Tensor, "b l f"]:
    """Arranges channels in GPT-OSS's order: each frequency once; its layers repeat them."""
    return angle
