"""The contract of an encoder: frames -> patches, prompt -> embedding."""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from .chunks import CHUNK_FRAMES


class Encoder(nn.Module, ABC):
    """Turns frames into patch features, and maps patches and prompts into one shared space.

    Attributes that a subclass sets:
        width: d, the width of the patch features.
        grid: rows and columns of patches in a frame.
        image_size: side of a square frame in pixels.
        per_frame: whether the patches of a frame depend on that frame alone, so that they may be
            stored and reused.
        class_tokens: tokens per frame that the blocks read besides the patches.
        reads_prompts: whether `align` and `encode_prompt` work, so that a prompt can guide the
            pooler.
        chunk_frames: frames that run at a time when no gradient is needed; None: all.
    """

    width: int
    grid: tuple[int, int]
    image_size: int
    per_frame: bool
    class_tokens: int = 0
    reads_prompts: bool = True
    chunk_frames: int | None = CHUNK_FRAMES

    @abstractmethod
    def forward(
        self, frames: Num[Tensor, "n c h w"], frame_counts: list[int]
    ) -> Float[Tensor, "n p d"]:
        """Returns the patch features without the class token. Normalises uint8 frames.

        `frame_counts` holds the number of frames of each visual; they sum to n.
        """

    @abstractmethod
    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        """Maps patch features into the space shared with prompts; does not normalise them."""

    @abstractmethod
    def encode_prompt(
        self, prompt_ids: Int[Tensor, "b k"], prompt_mask: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b e"]:
        """Returns one embedding per prompt in the space shared with patches; not normalised."""

    @abstractmethod
    def prompt_modules(self) -> list[nn.Module]:
        """Returns the modules that only `align` and `encode_prompt` use."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run; each runs once per batch."""

    @abstractmethod
    def to_spec(self) -> dict:
        """Returns the class path and arguments that rebuild this component without its source."""

    def copied(self) -> dict[str, str]:
        """Maps each parameter that starts as a copy to its original; names as in the state dict."""
        return {}
