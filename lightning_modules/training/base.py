"""The base class of all stages of training: builds the network, runs steps, makes the optimizer."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from datamodules.base import VideoDataModule
from lightning_modules.distributed.blank import always_encode
from lightning_modules.distributed.sharding import agree_on_gradients, clip_norm, shard
from lightning_modules.training.initial import Initial
from lightning_modules.training.optim import follow, try_optimizer
from lightning_modules.training.step import StepLoss
from lightning_modules.training.tuning import Tuning

Network = TypeVar("Network", bound=nn.Module)


class TrainingModule(LightningModule, Generic[Network]):
    """Builds one network from the specs of its components, and optimises its trained parameters.

    Args:
        model: one spec each for `encoder`, `pooler`, `rotary` and `llm`; built in
            `configure_model`.
        optimizer: called with the parameters.
        scheduler: called with the optimizer and the total number of steps; steps once per
            optimizer step.
        tuning: selects the trained parameters; None: all of them.
        init: folder or checkpoint whose weights a new training starts from, as in `Initial`.
        init_allow: globs of names that may stay unmatched, under `unused` and `unfilled`.
        loss_mean: how the loss of an optimizer step is averaged, as in `StepLoss`.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[Optimizer, int], Any] | None = None,
        tuning: Tuning | None = None,
        init: str | None = None,
        init_allow: Mapping[str, Sequence[str]] | None = None,
        loss_mean: str = "step",
    ):
        super().__init__()
        self.step_loss = StepLoss(loss_mean)
        self.tuning = tuning or Tuning()
        self.spec: dict[str, Any] = {
            stage: dict(spec) if isinstance(spec, Mapping) else spec
            for stage, spec in model.items()
        }
        if self.tuning.lora:
            self.spec["lora"] = dict(self.tuning.lora)
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.init = Initial(init, **(init_allow or {})) if init else None
        self.resumed = False  # whether a checkpoint, with its own weights, is loaded next
        self.model: Network | None = None
        self._precision = Precision()

    @property
    def precision(self) -> Precision:
        """Returns the trainer's precision plugin; without a trainer, the plugin set here."""
        try:
            return self.trainer.precision_plugin
        except RuntimeError:  # there is no trainer
            return self._precision

    @precision.setter
    def precision(self, plugin: Precision) -> None:
        self._precision = plugin

    @abstractmethod
    def build(self) -> Network:
        """Builds a new network from `spec`, on torch's current default device and dtype."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build().train()  # components loaded from a source are in eval mode
            if self.init is not None and not self.resumed:
                self.init.fill(self.model, self.spec)
            self.tuning.prepare(self.model)
        self.shard(self.model)

    def shard(self, network: Any) -> None:
        """Prepares a network for several ranks: they run the same blocks, or share its weights."""
        if self.device_mesh is None:
            always_encode(network.encoder)
        else:
            mixed = self.precision.precision == "bf16-mixed"
            travel = torch.bfloat16 if mixed else None
            shard(network, network.blocks(), self.device_mesh, travel)

    def beside(self) -> list[nn.Module]:
        """Returns networks that the steps need, but that are neither trained nor submodules."""
        return []

    def check_sharing(self, data: VideoDataModule, ranks: int, accumulation: int) -> None:
        """Checks that the loss allows this batch layout; here, it allows every layout.

        Args:
            data: the datamodule.
            ranks: number of ranks.
            accumulation: micro-batches per optimizer step on each rank.

        Raises:
            ValueError: the layout is not allowed; the message says what to change.
        """

    def check(self) -> None:
        """Finds mistakes in the components on the meta device, before weights or data are read.

        It does nothing if a component has a `source`.

        Raises:
            ValueError: a component is wrong; the message names it and what to change.
        """
        if not any(spec.get("source") for spec in self._components().values()):
            with torch.device("meta"):
                network = self.build()
                self.tuning.prepare(network)
            if self.init is not None and not self.resumed:
                self.init.match(network)

    def _components(self) -> dict[str, dict[str, Any]]:
        return {stage: spec for stage, spec in self.spec.items() if isinstance(spec, dict)}

    def check_optimizer(self) -> None:
        """Finds mistakes in the optimizer, its groups and the schedule before anything is read.

        Raises:
            ValueError: one of them is wrong; the message names the key.
        """
        try_optimizer(self._make_optimizer, self._make_scheduler, self.tuning.groups)

    def on_fit_start(self) -> None:
        """Checks that the device can compute all gradients.

        Raises:
            ValueError: training needs a gradient for which the CPU has no kernel.
        """
        for stage, spec in self._components().items():
            if spec.get("attention") != "flex_attention" or self.device.type != "cpu":
                continue
            # Gradients to other components run through the LLM, even if it is frozen.
            if stage == "llm" or any(
                p.requires_grad for p in getattr(self.network, stage).parameters()
            ):
                raise ValueError(
                    f"model.{stage}.attention=flex_attention has no backward on a CPU: set "
                    f"model.{stage}.attention=sdpa, or train on a GPU (trainer=gpu)"
                )

    @property
    def network(self) -> Network:
        """Returns the model; builds it if needed."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @property
    def data_group(self) -> ProcessGroup | None:
        """Returns the group of data-parallel ranks, including this one; None for a single process.

        Tensor-parallel ranks read the same micro-batches and count once.
        """
        if self.device_mesh is not None:
            return self.device_mesh["data_parallel"].get_group()
        if distributed.is_available() and distributed.is_initialized():
            return distributed.group.WORLD
        return None

    def add_to_step(
        self, total: Tensor, terms: Tensor | int, samples: int, **beside: Tensor | float | int
    ) -> Tensor:
        """Adds a micro-batch to the optimizer step, as `StepLoss.add`; returns its loss.

        `beside` holds further sums. `log_step` gets them summed over all micro-batches and ranks.
        """
        return self.step_loss.add(total, terms, samples, self.data_group, **beside)

    def log_step(self, sums: Mapping[str, float]) -> None:
        """Logs an optimizer step from the sums over its micro-batches and ranks; called once."""
        loss = sums["loss"] / max(1.0, sums["terms"])
        self.log("train/loss", loss, prog_bar=True, batch_size=1)

    def on_train_start(self) -> None:
        self.step_loss.start()
        if self._make_scheduler is not None and self.trainer.global_step:
            (config,) = self.trainer.lr_scheduler_configs
            steps = int(self.trainer.estimated_stepping_batches)
            done, optimizer = self.trainer.global_step, self.trainer.optimizers[0]
            config.scheduler = follow(optimizer, self._make_scheduler, steps, done)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Overrides Lightning's hook, which runs at the last micro-batch of each step.

        It first rescales the gradients to those of the step's loss. Logging, clipping and the check
        for finite values come after that.
        """

        def closure() -> Any:
            result = optimizer_closure() if optimizer_closure else None
            accumulation = self.trainer.accumulate_grad_batches
            self.log_step(self.step_loss.finish(self.parameters(), accumulation, self.data_group))
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["step_loss"] = self.step_loss.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "step_loss" in checkpoint:  # older checkpoints have none
            self.step_loss.load_state_dict(checkpoint["step_loss"])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, and supports mixed shards and fused optimizers in bf16-mixed.

        Lightning refuses fused optimizers, because they unscale float16 gradients themselves.
        bfloat16 gradients are not scaled, so clipping is safe.
        """
        plugin = self.trainer.precision_plugin
        if self.device_mesh is not None:
            agree_on_gradients(plugin.main_params(optimizer), self.device_mesh["tensor_parallel"])
        if self.device_mesh is not None and gradient_clip_algorithm in (None, "norm"):
            clip_norm(plugin.main_params(optimizer), gradient_clip_val or 0.0)
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.tuning.parameter_groups(self.network))
        self.tuning.spare_norms_and_biases(optimizer)
        if self._make_scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = {"scheduler": self._make_scheduler(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
