"""The scores of a trained model on held-out shards: scores.json, and val/... in the loggers."""

from pathlib import Path
from typing import Any

from lightning import LightningDataModule, Trainer
from omegaconf import DictConfig

from datamodules.preference import PreferenceDataModule
from experiments.run.compose import build, plain
from lightning_modules.callbacks.score_book import ScoreBook
from lightning_modules.checkpoint import weights
from lightning_modules.model import VideoLanguageModel
from lightning_modules.training.instruct import VideoLLMModule


def score_answers(
    config: DictConfig,
    trainer: Trainer,
    model: VideoLanguageModel,
    datamodule: LightningDataModule,
    step: int,
) -> dict[str, float]:
    """The numbers by name; none where no scores are chosen or the data has nothing held out.

    `step` is what the model was trained to.

    Raises:
        ValueError: what is held out are pairs of answers.
    """
    if not config.scores or not config.data.get("val"):
        return {}
    if isinstance(datamodule, PreferenceDataModule):
        raise ValueError(
            "data.val holds pairs of answers, of which no score is known here: take needles "
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
    return {name: facts["value"] for name, facts in module.scored.items()}
