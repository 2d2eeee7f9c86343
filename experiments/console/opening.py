"""A callback that says what is trained, where a resumed run goes on, and how long it takes."""

import logging
import math
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch import nn

from datamodules.base import datamodule_of
from datamodules.batch import data_rank
from experiments.console.results import short_path
from experiments.run.compose import axes, plain
from experiments.run.files import read_curves
from lightning_modules.callbacks.heartbeat import read_status

logger = logging.getLogger(__name__)

#: The speed is told after this many optimizer steps, or earlier after this many seconds.
_STEPS, _SECONDS = 20, 60.0

#: Least remaining time that is told.
_WORTH_TELLING_S = 10.0

_PARTS = ("encoder", "pooler", "rotary", "llm")


class Opening(Callback):
    """Prints a summary when training starts, and its speed after some steps, on rank 0.

    Args:
        config: config of the training.
        folder: its run directory. It is read at once, before this start writes there.
    """

    def __init__(self, config: DictConfig, folder: Path):
        self._config, self._folder = config, folder
        self._reached, self._exact = last_step(folder)
        self._step = 0
        self._began: tuple[int, float] | None = None  # step and time after the first step
        self._told = False
        self._paused = 0.0  # when validation began

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if not trainer.is_global_zero:
            return
        for line in summary(self._config, self._folder, trainer, pl_module):
            print(line)
        total = trainer.estimated_stepping_batches
        if self._step:
            print(resumed(self._step, total, self._reached, self._exact))
        if total == 1 and trainer.max_steps != 1 and not self._config.trial:
            logger.warning(
                "this training is a single optimizer step: raise trainer.max_epochs, or lower "
                "data.global_batch_size=%d",
                datamodule_of(trainer).global_batch_size,
            )
        print(end="", flush=True)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._told or trainer.global_step == self._step or not trainer.is_global_zero:
            return
        self._step, now = trainer.global_step, time.monotonic()
        if self._began is None:  # the first step is slower than the others
            self._began = self._step, now
            return
        steps, seconds = self._step - self._began[0], now - self._began[1]
        if steps >= _STEPS or seconds >= _SECONDS:
            self._told = True
            self._tell_speed(trainer, steps / seconds)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._began is not None:
            step, began = self._began
            self._began = step, began + time.monotonic() - self._paused

    def _tell_speed(self, trainer: Trainer, per_s: float) -> None:
        left = trainer.estimated_stepping_batches - self._step
        if not math.isfinite(left) or left / per_s < _WORTH_TELLING_S:
            return
        tokens = trainer.callback_metrics.get("train/tokens")
        read = f", {float(tokens):,.0f} tokens in the last of them" if tokens is not None else ""
        print(
            f"{per_s:.3g} steps/s{read}: the other {left:.0f} steps take about "
            f"{duration(left / per_s)}, without validation",
            flush=True,
        )


def summary(
    config: DictConfig, folder: Path, trainer: Trainer, module: LightningModule
) -> list[str]:
    """Returns some ten lines about a training that is about to start."""
    chosen, network = axes(config), getattr(module, "network", module)
    lines = [f"training {config.run_name} (print_config=true shows all settings)"]
    for part in _PARTS:
        if not plain(config.model).get(part) or not hasattr(network, part):
            continue
        size = _size(getattr(network, part))
        positions = f", positions={chosen.get('positions')}" if part == "rotary" else ""
        lines.append(_line(part, f"{chosen.get(part)}{positions}{size}"))
    every = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    share = f"{short(trained)} of {short(every)} are trained (tuning={chosen.get('tuning')})"
    data = datamodule_of(trainer)
    return [
        *lines,
        _line("parameters", share),
        _line("data", _data(config, trainer, chosen)),
        _line("step", _one_step(trainer, data.global_batch_size, data.batch_size)),
        _line("length", _length(trainer)),
        _line(
            "device",
            f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision "
            f"{trainer.precision}",
        ),
        _line("directory", str(short_path(folder))),
    ]


def _line(name: str, text: str) -> str:
    return f"  {name:<11} {text}"


def _size(part: Any) -> str:
    """Returns the number of parameters of a component, and the sizes of an LLM."""
    count = sum(p.numel() for p in part.parameters()) if isinstance(part, nn.Module) else 0
    if not count:
        return ""
    sizes: Any = getattr(getattr(part, "lm", None), "config", None)
    layers = getattr(sizes, "num_hidden_layers", None)
    shape = f", {layers} layers of width {sizes.hidden_size}" if layers else ""
    return f": {short(count)} parameters{shape}"


def _data(config: DictConfig, trainer: Trainer, chosen: dict[str, Any]) -> str:
    data, told = plain(config.data), str(chosen.get("data"))
    if isinstance(data.get("train"), str):
        told += f", {_place(data['train'])}"
    batches, batch = trainer.num_training_batches, datamodule_of(trainer)
    if math.isfinite(batches) and batch.even:
        told += f": {batches * batch.batch_size * data_rank(trainer)[1]:,.0f} samples an epoch"
    held_out = data.get("val")
    if "val" in data:
        told += f"; validation on {_place(held_out)}" if held_out else "; no validation"
    return told


def _place(shards: Any) -> str:
    """Returns the path of shards as it is short, or the names of a mixture."""
    if isinstance(shards, dict):
        return " + ".join(map(str, shards))
    if isinstance(shards, list):
        return " + ".join(map(_place, shards))
    return str(short_path(Path(shards))) if Path(shards).is_absolute() else str(shards)


def _one_step(trainer: Trainer, samples: int, batch: int) -> str:
    ranks = data_rank(trainer)[1]
    shared = f", on {ranks} ranks" if ranks > 1 else ""
    batches = counted(trainer.accumulate_grad_batches, "batch", "es")
    return f"{counted(samples, 'sample')}: {batches} of {batch}{shared}"


def _length(trainer: Trainer) -> str:
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total):
        return "without an end"
    epochs = trainer.max_epochs or 0
    within = f", at most {counted(epochs, 'epoch')}" if epochs > 0 else ""
    return f"{counted(int(total), 'step')}{within}"


def counted(count: int, noun: str, ending: str = "s") -> str:
    """Returns a count with its noun: `1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def last_step(folder: Path) -> tuple[int, bool]:
    """Returns the last step that an earlier start is known to have taken, and if it was the last.

    A killed process leaves its last heartbeat and its last logged metrics, which may be some steps
    old.
    """
    status = read_status(folder / "status.json")
    try:
        logged = read_curves(folder / "metrics.csv").get("train/loss", [])
    except ValueError:
        logged = []
    # A row of training has the number of steps before it.
    reached = max(int(status.get("step") or 0), *(step + 1 for step, _ in logged[-1:]), 0)
    return reached, status.get("state") in ("stopped", "failed", "trained", "tested")


def resumed(step: int, total: float, reached: int, exact: bool) -> str:
    """Returns the line that says where a resumed training goes on.

    Args:
        step: step of the checkpoint.
        total: number of steps of the training.
        reached: last step that an earlier start is known to have taken.
        exact: whether it took no further step.
    """
    end = f" of {total:.0f}" if math.isfinite(total) else ""
    told = f"goes on from step {step}{end}"
    if reached > step:
        first, last = step + 1, reached
        steps = f"step {last} is" if first == last else f"steps {first} to {last} are"
        return f"{told}; {steps} taken again{'' if exact else ', and any that were not logged'}"
    return told if exact else f"{told}; steps that were not logged are taken again"


def duration(seconds: float) -> str:
    """Returns a time in words, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def short(count: int) -> str:
    """Returns a number of parameters, such as `135 M`."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
