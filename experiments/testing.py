"""Tests a trained model: needle tests, and scores on held-out shards."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from datamodules.batch import VideoBatch
from datamodules.common.spec import class_name
from datamodules.preference import PreferenceDataModule
from experiments.reporting.measured import read_needle
from experiments.run.compose import build, plain
from lightning_modules.callbacks.score_book import ScoreBook
from lightning_modules.checkpoint import weights
from lightning_modules.metrics.needle.scores import NeedleModule
from lightning_modules.model import VideoLanguageModel
from lightning_modules.training.instruct import VideoLLMModule


def test_needles(
    config: DictConfig,
    trainer: Trainer,
    model: VideoLanguageModel,
    datamodule: LightningDataModule,
    step: int,
) -> float | None:
    """Runs the needle test and returns the share of needles found without distractors.

    Writes needle.json and needle.png, and logs both. The share is over all lengths and depths.

    Args:
        step: number of steps that the model was trained for.

    Returns:
        The share, or None if the datamodule has no test or no cell without distractors.
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
        # Imported here because it imports matplotlib, which a training needs only at its end.
        from experiments.reporting.plots import save_heatmap

        picture = save_heatmap(needle, folder / "needle.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("needle/heatmap", [str(picture)], step=step)
    return module.scores.mean("plain") if "plain" in module.scores.cells else None


def score_answers(
    config: DictConfig,
    trainer: Trainer,
    model: VideoLanguageModel,
    datamodule: LightningDataModule,
    step: int,
) -> None:
    """Scores the answers to held-out questions, if scores are chosen and the data has any.

    Writes scores.json and the answers, and logs the scores under val/ and blind/.

    Args:
        step: number of steps that the model was trained for.

    Raises:
        ValueError: the held-out data are pairs of answers.
    """
    if not config.scores or not config.data.get("val"):
        return
    if isinstance(datamodule, PreferenceDataModule):
        raise ValueError(
            "data.val holds pairs of answers, which no score here can judge: choose needles "
            "(data=vniah eval=vniah_d_tiny) or questions (data=instruct data.train=null "
            "data.val=SHARDS)"
        )
    scores: dict[str, Any] = build(config.scores, "scores")
    optimizer = build(config.optim.optimizer, "optim")  # not used
    module = VideoLLMModule(plain(config.model), optimizer, scores=scores)
    module.model = model
    used = {"from": str(config.run), "sha256": weights.sha256(model)}
    book = ScoreBook(config.paths.run, Path(config.run).resolve().name, used, step)
    trainer.callbacks.append(book)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.validate(module, datamodule=datamodule, verbose=False)
    if config.blind:
        answer_blindly(trainer, module, datamodule)


def score_last_weights(
    config: DictConfig, trainer: Trainer, module: LightningModule, datamodule: LightningDataModule
) -> None:
    """Scores the weights at the end of training, unless its last validation has done so.

    If `config.blind`, the questions are then answered without frames.
    """
    if not isinstance(module, VideoLLMModule) or not module.score_by_name or config.trial:
        return
    if not config.data.get("val") or not trainer.limit_val_batches:  # pyright: ignore[reportAttributeAccessIssue]
        return
    if module.scored_at != trainer.global_step:
        trainer.validate(module, datamodule=datamodule, verbose=False)
    if config.blind:
        answer_blindly(trainer, module, datamodule)


def answer_blindly(
    trainer: Trainer, module: VideoLLMModule, datamodule: LightningDataModule
) -> None:
    """Answers the questions of the last validation again, without frames: a score of guessing.

    A score that is no better comes from the questions alone, not from the videos.
    """
    if not module.has_questions():
        return
    module.condition, module.see = "blind", VideoBatch.without_visuals
    trainer.validate(module, datamodule=datamodule, verbose=False)


def describe(config: DictConfig, model: VideoLanguageModel, step: int) -> dict[str, Any]:
    """Returns the settings that a reader needs to understand the numbers."""
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
    """Returns the name of the chosen option, or the class name if the model has another scheme."""
    spec = model.config.rotary or {}
    if spec == plain(config.model.rotary):
        return HydraConfig.get().runtime.choices["rotary"]
    return class_name(spec)
