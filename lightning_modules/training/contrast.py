"""Post-training of CLIP on long captions, after its text context was stretched from 77 positions.

A contrastive loss compares each visual and its caption with all others of the global batch
(Long-CLIP, arXiv 2403.15378; PPLLaVA, arXiv 2411.02327, section 3.3). Stretched text positions are
trained; kept positions are frozen.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim import Optimizer

from datamodules.base import VideoDataModule, datamodule_of
from datamodules.batch import VideoBatch
from lightning_modules.distributed.gather import gather
from lightning_modules.encoder.base import Encoder
from lightning_modules.encoder.clip import ClipEncoder
from lightning_modules.encoder.prompt import SplitPositions
from lightning_modules.metrics.retrieval import Retrieval
from lightning_modules.spec import build
from lightning_modules.training.base import TrainingModule

_LARGEST_LOG_SCALE = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5


class Pairs(NamedTuple):
    """Unit vectors of visuals and captions; row i of one belongs to row i of the other."""

    visuals: Float[Tensor, "b e"]
    captions: Float[Tensor, "b e"]
    scale: Float[Tensor, "1"]  # factor on the similarities in the loss: 1 / temperature


class ContrastiveClip(nn.Module):
    """Embeds the visual and the caption of each row as unit vectors.

    1. encoder:  visuals (t c h w)      -> class tokens (n d), per frame
    2. encoder:  class tokens           -> embeddings (n e), then means over frames (b e)
    3. encoder:  captions (b k)         -> embeddings (b e)

    With `feature_layer` -1 these are the embeddings of CLIP itself. All frames of a video have the
    same weight (CLIP4Clip's mean pooling, arXiv 2104.08860).

    Args:
        encoder: spec of a `ClipEncoder`.
        temperature: initial temperature; CLIP's own weights ended at 0.01.
    """

    def __init__(self, encoder: Mapping[str, Any], temperature: float):
        super().__init__()
        self.encoder: ClipEncoder = build(encoder, Encoder)
        if not isinstance(self.encoder, ClipEncoder):
            raise ValueError(
                f"model.encoder is {type(self.encoder).__name__}, but this stage trains the text "
                "context of CLIP: choose encoder=clip_large_336 or another ClipEncoder"
            )
        # A tensor of one element, because FSDP2 does not shard scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), -math.log(temperature)))
        positions = self.encoder.text.embeddings.position_embedding
        if isinstance(positions, SplitPositions):
            positions.kept.requires_grad_(False)

    def forward(self, batch: VideoBatch) -> Pairs:
        """Returns the embeddings of all pairs.

        Raises:
            ValueError: a row does not have exactly one visual.
        """
        if len(batch.shapes) != len(batch):
            raise ValueError(
                f"{len(batch.shapes)} visuals for {len(batch)} captions: each caption needs "
                "exactly one; choose data=captions, which refuses other samples"
            )
        encoded = self.encoder(batch.visuals, class_token=True)
        tokens = torch.cat([visual.features for visual in encoded])  # n d
        frames = normalize(self.encoder.align(tokens).float(), dim=-1)  # n e
        means = torch.stack([visual.mean(0) for visual in frames.split(list(map(len, encoded)))])
        captions = self.encoder.encode_prompt(batch.prompt_ids, batch.prompt_mask)
        return Pairs(
            normalize(means, dim=-1),
            normalize(captions.float(), dim=-1),
            self.logit_scale.float().exp(),
        )

    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run."""
        return self.encoder.blocks()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        self.logit_scale.clamp_(max=_LARGEST_LOG_SCALE)


class ClipContextModule(TrainingModule[ContrastiveClip]):
    """Trains `encoder` of `model` on captions; the other components are not built.

    The loss contrasts the pairs of all ranks. The gradient equals that of one process that reads
    all pairs.

    Args:
        temperature: as in `ContrastiveClip`.
        training: other arguments of `TrainingModule`.

    Raises:
        ValueError: an optimizer step has several micro-batches, which could not be compared with
            each other, or ranks have batches of different sizes.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer, int], Any] | None = None,
        temperature: float = 0.01,
        **training: Any,
    ):
        super().__init__({"encoder": model["encoder"]}, optimizer, scheduler, **training)
        self.temperature = temperature
        self.retrieval = Retrieval()

    def build(self) -> ContrastiveClip:
        return ContrastiveClip(self.spec["encoder"], self.temperature)

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if stage == "fit":
            self.check_sharing(
                datamodule_of(trainer), trainer.world_size, trainer.accumulate_grad_batches
            )

    def check_sharing(self, data: VideoDataModule, ranks: int, accumulation: int) -> None:
        if accumulation != 1:
            size = data.global_batch_size
            raise ValueError(
                f"data.global_batch_size={size} with data.batch_size={data.batch_size} on {ranks} "
                f"ranks makes {accumulation} micro-batches a step, but pairs are compared only "
                f"within one: set data.batch_size={size // ranks}, or "
                f"data.global_batch_size={ranks * data.batch_size}"
            )
        if ranks > 1 and not data.even:
            raise ValueError(
                "data.stream.max_tokens gives ranks batches of different sizes, but the contrast "
                f"over {ranks} ranks needs equal numbers of pairs: set data.stream.max_tokens=null"
            )

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        pairs = self.network(batch)
        with torch.autocast(self.device.type, enabled=False):
            everyone = gather(pairs.visuals), gather(pairs.captions)
            loss = contrast(pairs, *everyone, self.global_rank)
        self.log("encoder/logit_scale", pairs.scale.squeeze(), batch_size=len(batch))
        tokens = batch.prompt_mask.sum()
        return self.add_to_step(loss, len(batch), len(batch), tokens=tokens)

    def log_step(self, sums: Mapping[str, float]) -> None:
        super().log_step(sums)
        self.log("train/tokens", sums["tokens"], batch_size=1)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        pairs = self.network(batch)
        self.retrieval.update(pairs.visuals, pairs.captions, batch.keys, pairs.scale)

    def on_validation_epoch_end(self) -> None:
        scores = self.retrieval.compute()  # over all ranks, so the same on each
        self.retrieval.reset()
        self.log("val/loss", scores.pop("loss"), prog_bar=True, sync_dist=True)
        self.log_dict({f"val/{name}": score for name, score in scores.items()}, sync_dist=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.network.clamp_scale()  # before a checkpoint of this step is written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the encoder's spec with the weights, as plain containers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = {"encoder": self.network.encoder.to_spec()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint belongs to this stage of training.

        Raises:
            ValueError: the checkpoint belongs to another stage of training.
        """
        super().on_load_checkpoint(checkpoint)
        stages = checkpoint.get("stages", {})
        if stages.keys() != {"encoder"}:
            raise ValueError(
                f"the checkpoint holds {', '.join(sorted(stages)) or 'no components'}, but "
                "module=clip_context trains the encoder alone: choose the module that it was "
                "trained with, or another run directory"
            )


def contrast(
    own: Pairs, visuals: Float[Tensor, "all e"], captions: Float[Tensor, "all e"], rank: int
) -> Float[Tensor, ""]:
    """Returns the symmetric InfoNCE loss of this rank's pairs against all, summed over `own` pairs.

    Each rank computes its rows of the similarity matrix. The sum over ranks, divided by the number
    of all pairs, is the loss of the whole matrix.
    """
    target = torch.arange(len(own.visuals), device=visuals.device) + rank * len(own.visuals)
    of_visuals = cross_entropy(own.scale * own.visuals @ captions.T, target, reduction="sum")
    of_captions = cross_entropy(own.scale * own.captions @ visuals.T, target, reduction="sum")
    return (of_visuals + of_captions) / 2
