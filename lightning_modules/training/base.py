"""What every stage of training shares: the network, when it is built, its steps and optimizer."""

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
from lightning_modules.distributed.sharding import agree_on_gradients, clip_norm, shard
from lightning_modules.training.initial import Initial
from lightning_modules.training.optim import follow, try_optimizer
from lightning_modules.training.step import StepLoss
from lightning_modules.training.tuning import Tuning

Network = TypeVar("Network", bound=nn.Module)


class TrainingModule(LightningModule, Generic[Network]):
    """Builds one network from the specs of its stages, and optimises what of it is trained.

    Args:
        model: `encoder`, `pooler`, `rotary` and `llm`, a spec each; built in `configure_model`.
        optimizer: takes parameters.
        scheduler: takes the optimizer and the steps of the whole training; one step a batch.
        tuning: what is trained; None: all of it.
        init: folder or checkpoint whose weights a new training starts from, as in `Initial`.
        init_allow: globs of what may be left over, under `unused` and `unfilled`.
        loss_mean: what the loss of an optimizer step is a mean of, as in `StepLoss`.
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
        self.spec = {stage: dict(spec) for stage, spec in model.items()}
        if self.tuning.lora:
            self.spec["lora"] = dict(self.tuning.lora)
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.init = Initial(init, **(init_allow or {})) if init else None
        self.resumed = False  # whether a checkpoint is loaded next, which has its own weights
        self.model: Network | None = None
        self._precision = Precision()

    @property
    def precision(self) -> Precision:
        """What casts weights and forwards: the trainer's plugin; without one, what was set here."""
        return self._precision if self._trainer is None else self._trainer.precision_plugin

    @precision.setter
    def precision(self, plugin: Precision) -> None:
        self._precision = plugin

    @abstractmethod
    def build(self) -> Network:
        """A new network of `spec`, on whatever device and with whatever dtype torch is set to."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build().train()  # what was loaded from a source is not so by itself
            if self.init is not None and not self.resumed:
                self.init.fill(self.model, self.spec)
            self.tuning.prepare(self.model)
        self.shard(self.model)

    def shard(self, network: Any) -> None:
        """Spreads a network over the ranks by its `blocks`, where the strategy is to have it so."""
        if self.device_mesh is not None:
            mixed = self.precision.precision == "bf16-mixed"
            travel = torch.bfloat16 if mixed else None
            shard(network, network.blocks(), self.device_mesh, travel)

    def beside(self) -> list[nn.Module]:
        """Networks that the steps need and that are not trained, nor among the submodules."""
        return []

    def check_sharing(self, data: VideoDataModule, ranks: int, accumulation: int) -> None:
        """Refuses what the loss does not allow: here, nothing.

        Args:
            data: the datamodule.
            accumulation: micro-batches of an optimizer step, of each of so many ranks.

        Raises:
            ValueError: says what to change.
        """

    def check(self) -> None:
        """Finds mistakes in the stages on the meta device, before weights or data are read.

        Raises:
            ValueError: names the stage and what to change. A stage with a `source` is left out.
        """
        if not any(spec.get("source") for spec in self.spec.values()):
            with torch.device("meta"):
                network = self.build()
                self.tuning.prepare(network)
            if self.init is not None and not self.resumed:
                self.init.match(network)

    def check_optimizer(self) -> None:
        """Finds mistakes in the optimizer, its groups and the schedule before anything is read.

        Raises:
            ValueError: names the key.
        """
        try_optimizer(self._make_optimizer, self._make_scheduler, self.tuning.groups)

    def on_fit_start(self) -> None:
        """
        Raises:
            ValueError: training needs a gradient that a CPU has no kernel for.
        """
        for stage, spec in self.spec.items():
            if spec.get("attention") != "flex_attention" or self.device.type != "cpu":
                continue
            # Gradients on their way to other stages run through the LLM, trained or not.
            if stage == "llm" or any(
                p.requires_grad for p in getattr(self.network, stage).parameters()
            ):
                raise ValueError(
                    f"model.{stage}.attention=flex_attention has no backward on a CPU: set "
                    f"model.{stage}.attention=sdpa, or train on a GPU (trainer=gpu)"
                )

    @property
    def network(self) -> Network:
        """The model, once it is there."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @property
    def data_group(self) -> ProcessGroup | None:
        """The ranks that read different micro-batches, this one among them; None: no other does.

        Ranks that split the layers of a model among them read the same, and count once.
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

        `beside` are more sums, which `log_step` gets for all micro-batches and ranks together.
        """
        return self.step_loss.add(total, terms, samples, self.data_group, **beside)

    def log_step(self, sums: Mapping[str, float]) -> None:
        """Logs an optimizer step, once, from the sums over its micro-batches and ranks."""
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
        """Lightning's. It is called for the last micro-batch of a step, also where that is short.

        The gradients become those of the step's loss before anybody looks at them, clips them or
        judges whether they are finite.
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
        """Lightning's, also for shards of several kinds and for fused optimizers in bf16-mixed.

        These it refuses, as they undo the scaling of float16's gradients by themselves; those of
        bfloat16 are not scaled.
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
