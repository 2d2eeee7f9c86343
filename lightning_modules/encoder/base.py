"""frames -> patches; prompt -> embedding. The contract of the first stage."""

from abc import ABC, abstractmethod

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from .chunks import CHUNK_FRAMES


class Encoder(nn.Module, ABC):
    """Turns frames into patch features, and puts patches and prompts into one space.

    Attributes a subclass sets:
        width: d, of the patch features.
        grid: rows and columns of patches in a frame.
        image_size: side of a frame in pixels, square.
        per_frame: a frame's patches depend on that frame alone, so they may be kept and reused.
        class_tokens: tokens that the blocks read of a frame beside its patches.
        reads_prompts: `align` and `encode_prompt` work, so that a prompt can guide the pooler.
        chunk_frames: frames that run at a time where no gradient is asked for; None: all.
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
        """Patch features, class token left out. uint8 frames are normalised here.

        `frame_counts` says how many of the n frames belong to each visual.
        """

    @abstractmethod
    def align(self, patches: Float[Tensor, "*n p d"]) -> Float[Tensor, "*n p e"]:
        """Patch features in the space shared with prompts; not normalised."""

    @abstractmethod
    def encode_prompt(
        self, prompt_ids: Int[Tensor, "b k"], prompt_mask: Bool[Tensor, "b k"]
    ) -> Float[Tensor, "b e"]:
        """One embedding a prompt in the space shared with patches; not normalised."""

    @abstractmethod
    def prompt_modules(self) -> list[nn.Module]:
        """What `align` and `encode_prompt` alone use."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The units to shard, in the order in which they run; each runs once for a batch."""

    @abstractmethod
    def to_spec(self) -> dict:
        """Class path and arguments that rebuild this stage without reading its source again."""

    def copied(self) -> dict[str, str]:
        """Parameters that start as copies of others, and of which; names as in the state dict."""
        return {}
