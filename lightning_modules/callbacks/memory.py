"""Explains an out-of-memory error in one line: where it happened, and what to lower."""

import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_modules.recompute import is_running_again
from lightning_modules.tokens import VisualTokens

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the error means that CUDA or the CPU's allocator is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)


class OutOfMemory(Callback):
    """Adds an explanation to an out-of-memory error as a note; `user_errors_in_one_line` prints it.

    Hooks on the network's components and on their outputs track the current component. No hook is
    inside a block, so blocks may be compiled, sharded or recomputed.

    Args:
        settings: values that can be lowered, by config key; None if a run has no such key.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = {key: value for key, value in settings.items() if value is not None}
        self._where, self._backward = "weights", False
        self._handles: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        for name, stage in network.named_children():
            for module in (stage, *stage.children()):  # some components run only in parts
                self._handles += [
                    module.register_forward_pre_hook(partial(self._entered, name)),
                    module.register_forward_hook(partial(self._left, name)),
                ]

    def on_train_batch_start(self, *args: Any) -> None:
        self._is_at("batch")

    def on_before_backward(self, *args: Any) -> None:
        self._is_at("loss", backward=True)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._is_at("optimizer")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if is_out_of_memory(exception):
            exception.add_note(self._describe(str(exception), trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _is_at(self, where: str, backward: bool = False, gradient: Tensor | None = None) -> None:
        self._where, self._backward = where, backward

    def _entered(self, name: str, module: nn.Module, args: Any) -> None:
        self._is_at(name, backward=is_running_again())

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if is_running_again():
            return  # still in the backward pass of this component
        self._is_at("loss" if name == "llm" else name)
        for part in output if isinstance(output, list) else [output]:
            part = part.features if isinstance(part, VisualTokens) else part
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(partial(self._is_at, name, True))

    def _describe(self, error: str, trainer: Trainer, pl_module: LightningModule) -> str:
        place = f"the backward pass of {self._where}" if self._backward else self._where
        asked, free = _amounts(error)
        remedies = self._remedies(trainer, pl_module)
        return f"out of memory in {place}: {asked} requested, {free} free; set " + " or ".join(
            remedies
        )

    def _remedies(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Returns at most two config keys to set; the most likely to help comes first."""
        known, remedies = self._settings, []
        stage: Any = getattr(pl_module.network, self._where, None)
        checkpointed = known.get("tuning.checkpointing")
        if self._where in ("weights", "optimizer"):
            if not isinstance(trainer.strategy, ModelParallelStrategy):
                remedies.append("trainer=fsdp")
            remedies.append("tuning=lora" if checkpointed is not None else "a smaller llm")
        elif checkpointed is not None and hasattr(stage, "blocks"):
            learns = any(p.requires_grad for p in stage.parameters())
            if learns and self._where not in checkpointed:
                stages = ",".join([*checkpointed, self._where])
                remedies.append(f"tuning.checkpointing=[{stages}]")
        smaller = ["data.batch_size"]
        of_visuals = ["data.frames.sampler.num_frames", "data.frames.sampler.max_frames"]
        of_text = ["data.conversation.max_length"]
        smaller += of_text + of_visuals if self._where == "loss" else of_visuals + of_text
        for key in smaller:
            if known.get(key, 1) > 1:
                remedies.append(f"{key}={known[key] // 2} (it is {known[key]})")
        return (remedies or ["trainer=fsdp"])[:2]


def _amounts(error: str) -> tuple[str, str]:
    """Returns the requested and the free memory, from the error text or the system."""
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", error, re.IGNORECASE)
    free = re.search(r"of which ([\d.]+) (\w+) is free", error)
    there = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _amount(asked), _amount(free) if free else _gib(float(there))


def _amount(found: re.Match[str] | None) -> str:
    return _gib(float(found[1]) * _UNITS.get(found[2], 1)) if found else "more"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
