"""The needle test of a trained model: needle.json, needle.png, and both in the loggers."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from experiments.reporting.data import read_needle
from experiments.reporting.plots import save_heatmap
from experiments.run.compose import plain
from lightning_modules.metrics.needle.scores import NeedleModule
from lightning_modules.model import VideoLanguageModel


def test_needles(
    config: DictConfig,
    trainer: Trainer,
    model: VideoLanguageModel,
    datamodule: LightningDataModule,
    step: int,
) -> float | None:
    """Share of needles found without distractors, over all lengths and depths.

    `step` is what the model was trained to. None where the datamodule has no test.
    """
    if "grid" not in config.data:
        return None
    folder = Path(config.paths.run)
    protocol = describe(config, model, step)
    module = NeedleModule(model, folder=folder, protocol=protocol)
    trainer.test(module, datamodule=datamodule, verbose=False)
    if trainer.is_global_zero:
        needle = read_needle(folder / "needle.json")
        assert needle is not None
        picture = save_heatmap(needle, folder / "needle.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("needle/heatmap", [str(picture)], step=step)
    return module.scores.mean("plain") if "plain" in module.scores.cells else None


def describe(config: DictConfig, model: VideoLanguageModel, step: int) -> dict[str, Any]:
    """What a reader of the numbers must know about how they came about."""
    data = plain(config.data)
    # Distractors need not be periodic.
    periods = [c["period"] for c in data["grid"]["conditions"].values() if c and "period" in c]
    return {
        "run": config.run_name,
        "rotary": _rotary(config, model),
        "seed": config.seed,
        "step": step,
        "protocol": {
            "train_frames": data["training"]["frames"],
            "period": min(periods, default=0),
            "needles": data["grid"]["needles"],
            "depths": data["grid"]["depths"],
            "frames": data["grid"]["frames"],
        },
    }


def _rotary(config: DictConfig, model: VideoLanguageModel) -> str:
    """The option's name, or where the model runs another scheme than the config's, its class."""
    spec = model.config.rotary or {}
    if spec == plain(config.model.rotary):
        return HydraConfig.get().runtime.choices["rotary"]
    return spec["_target_"].rpartition(".")[2]
