"""Instruction tuning: steps, logging and optimisers; the maths is the model's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from datamodules.batch import VideoBatch
from lightning_modules.model import Output, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.sharding import shard


class VideoLLMModule(LightningModule):
    """Trains a `VideoLanguageModel` on the answers of conversations.

    Args:
        model: `encoder`, `pooler`, `rotary` and `llm`, a spec each; built in `configure_model`.
        optimizer: takes parameters.
        scheduler: takes the optimizer and the steps of the whole training; one step a batch.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer, int], Any] | None = None,
    ):
        super().__init__()
        self.spec = {stage: dict(spec) for stage, spec in model.items()}
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.model: VideoLanguageModel | None = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = VideoLanguageModel(VideoLanguageModelConfig(**self.spec))
        if self.device_mesh is not None:
            shard(self.model, self.model.blocks(), self.device_mesh["data_parallel"])

    def check(self) -> None:
        """Finds mistakes in the stages on the meta device, before weights or data are read.

        Raises:
            ValueError: names the stage and what to change. A stage with a `source` is left out.
        """
        if not any(spec.get("source") for spec in self.spec.values()):
            with torch.device("meta"):
                VideoLanguageModel(VideoLanguageModelConfig(**self.spec))

    @property
    def network(self) -> VideoLanguageModel:
        """The model, once it is there."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

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

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = self._make_optimizer(trained)
        if self._make_scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = {"scheduler": self._make_scheduler(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The stages travel with the weights, as plain containers."""
        config = self.network.config
        checkpoint["stages"] = {stage: getattr(config, stage) for stage in self.spec}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that were trained with another rotary scheme or pooler.

        Raises:
            ValueError: names the stage that differs and both specs.
        """
        for stage in ("rotary", "pooler"):
            trained = checkpoint.get("stages", {}).get(stage)
            asked = getattr(self.network.config, stage)
            if trained is not None and trained != asked:
                raise ValueError(
                    f"the checkpoint was trained with {stage} {trained}, this run has {asked}: "
                    f"choose that {stage}, or another run directory"
                )
