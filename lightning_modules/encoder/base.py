"""The contract of an encoder: visuals -> tokens; if it reads prompts, prompt -> embedding."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from datamodules.batch import Grid, Visual
from lightning_modules.tokens import VisualTokens

from .chunks import CHUNK_FRAMES


class Encoder(nn.Module, ABC):
    """Turns visuals into tokens. It may also map tokens and prompts into one shared space.

    An encoder that reads prompts overrides `align`, `encode_prompt` and `prompt_modules`.

    Attributes that a subclass sets:
        width: d, the width of the tokens' features.
        per_frame: whether the tokens of a time step depend on its frames alone, so that they may
            be stored and reused.
        frames_per_step: frames that are read together as one time step. Where the last step has too
            few, its last frame is repeated; so a frame alone is one time step, too.
        class_tokens: tokens per frame that the blocks read besides the patches.
        reads_prompts: whether `align` and `encode_prompt` work, so that a prompt can guide the
            pooler.
        chunk_frames: frames that run at a time when no gradient is needed; None: all.
        projector_width: width between the two linears of the projector; None: that of the LLM.
    """

    width: int
    per_frame: bool
    frames_per_step: int = 1
    class_tokens: int = 0
    reads_prompts: bool = False
    chunk_frames: int | None = CHUNK_FRAMES
    projector_width: int | None = None

    @abstractmethod
    def forward(self, visuals: Sequence[Visual]) -> list[VisualTokens]:
        """Returns the tokens of each visual: one per patch, without class tokens.

        Normalises uint8 frames. All visuals run together, so each block runs once.

        Raises:
            ValueError: the encoder cannot read frames of this size.
        """

    @abstractmethod
    def extent(self, frames: int, height: int, width: int) -> Grid:
        """Returns the grid of tokens of a visual of this size in frames and pixels.

        It needs no weights, so the number of tokens is known before anything is computed.
        """

    @abstractmethod
    def blank(self) -> Visual:
        """Returns a small visual that this encoder and the poolers behind it read, on the CPU."""

    def reads(self, frames: int, height: int, width: int) -> tuple[int, int | float]:
        """Returns how many tokens the blocks read of a visual, and how many each attends to.

        The second number is a mean over tokens and blocks. Both need no weights.
        """
        length = self.extent(1, height, width).size + self.class_tokens
        return frames * length, length

    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        """Maps features of patches into the space shared with prompts; does not normalise them.

        Raises:
            ValueError: the encoder reads no prompts.
        """
        raise no_prompts()

    def encode_prompt(
        self, prompt_ids: Int[Tensor, "b k"], prompt_mask: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b e"]:
        """Returns one embedding per prompt in the space shared with patches; not normalised.

        Raises:
            ValueError: the encoder reads no prompts.
        """
        raise no_prompts()

    def prompt_modules(self) -> list[nn.Module]:
        """Returns the modules that only `align` and `encode_prompt` use."""
        return []

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run; each runs once per batch."""

    @abstractmethod
    def to_spec(self) -> dict:
        """Returns the class path and arguments that rebuild this component without its source."""

    def copied(self) -> dict[str, str]:
        """Maps each parameter that starts as a copy to its original; names as in the state dict."""
        return {}


def no_prompts() -> ValueError:
    return ValueError(
        "this encoder has no text tower, which must read prompts: choose a pooler that needs no "
        "prompt (pooler=average, none), or an encoder with a text tower (encoder=clip_large_336)"
    )
