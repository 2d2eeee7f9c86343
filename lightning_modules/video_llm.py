"""Instruction tuning: steps, logging, the stages in its checkpoints. The maths is the model's."""

from typing import Any

from torch import Tensor, nn

from datamodules.batch import VideoBatch
from lightning_modules.model import Output, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training import TrainingModule


class VideoLLMModule(TrainingModule[VideoLanguageModel]):
    """Trains a `VideoLanguageModel` on the answers of conversations."""

    def build(self) -> VideoLanguageModel:
        return VideoLanguageModel(VideoLanguageModelConfig(**self.spec))

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks()

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        output: Output = self.network(batch)
        self.log("train/loss", output.loss, prog_bar=True, batch_size=len(batch))
        self.log("train/tokens", output.inputs.mask.sum().float(), batch_size=len(batch))
        effective = self.network.pooler.last_effective_tokens
        if effective is not None:
            self.log("pooler/effective_tokens", effective, batch_size=len(batch))
        return output.loss

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        output: Output = self.network(batch)
        # A mean over tokens, so that the number does not depend on how samples are batched.
        weight = max(1, int(output.labelled))
        self.log("val/loss", output.loss, prog_bar=True, batch_size=weight, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The stages travel with the weights, as plain containers."""
        config = self.network.config
        checkpoint["stages"] = {stage: getattr(config, stage) for stage in self.spec}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that were trained with another rotary scheme, pooler or LoRA.

        Raises:
            ValueError: names the stage that differs and both specs.
        """
        stages = checkpoint.get("stages", {})
        for stage in ("rotary", "pooler", "lora"):
            trained, asked = stages.get(stage), getattr(self.network.config, stage)
            if stages and trained != asked:
                raise ValueError(
                    f"the checkpoint was trained with {stage} {trained}, this run has {asked}: "
                    f"choose that {stage}, or another run directory"
                )
