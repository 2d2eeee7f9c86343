"""ropelab-evaluate: tests a trained model, with its own stages and another grid if one likes.

ropelab-evaluate run=runs/vniah_d_tiny/videorope-seed0 data.grid.frames=[24,512]
"""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
import wandb
import yaml
from omegaconf import DictConfig

from experiments import CONFIG_DIR
from experiments.needles import test_needles
from experiments.run import build, build_all, open_run_directory, plain, user_errors_in_one_line
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig

logger = logging.getLogger(__name__)


def main() -> None:
    """A checkpoint runs with the rotary scheme it was trained with, unless one is named here."""
    typed = sys.argv[1:]
    named = any(word.startswith(("rotary=", "model.rotary.")) for word in typed)
    sys.argv[1:] = [*training_overrides(typed), *typed]

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="evaluate")
    @user_errors_in_one_line
    def evaluate(config: DictConfig) -> float | None:
        # 1. The model as it was trained
        model = load(Path(config.run), plain(config.model.rotary) if named else None)
        open_run_directory(config)
        lightning.seed_everything(config.seed, workers=True, verbose=False)

        # 2. The data and the trainer
        datamodule = build(config.data, "data")
        callbacks = build_all({"progress": config.callbacks.progress}, "callbacks")
        loggers = build_all(config.logger, "logger")
        trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)

        # 3. The test
        score = test_needles(config, trainer, model, datamodule)
        wandb.finish()
        return score

    evaluate()


def training_overrides(typed: list[str]) -> list[str]:
    """What was overridden when the run named by `run=` was trained, to be overridden in turn."""
    folders = [word.partition("=")[2] for word in typed if word.startswith("run=")]
    kept = Path(folders[-1] if folders else "") / ".hydra" / "overrides.yaml"
    if not folders or not kept.is_file():
        return []
    return [word for word in yaml.safe_load(kept.read_text()) if not word.startswith("hydra.")]


def load(run: Path, rotary: dict[str, Any] | None) -> VideoLanguageModel:
    """The trained model; `rotary` takes the place of the scheme it was trained with.

    Raises:
        ValueError: there is no checkpoint, or its weights are not those of its stages.
    """
    if (run / "config.json").is_file():
        named = {"rotary": rotary} if rotary else {}
        return VideoLanguageModel.from_pretrained(run, **named).eval()
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ValueError(f"no checkpoint in {run}: set run= to a run directory with {path.name}")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    stages = checkpoint["stages"]
    if rotary and rotary != stages["rotary"]:
        logger.warning("trained with %s, run with %s as asked", stages["rotary"], rotary)
        stages = {**stages, "rotary": rotary}
    model = VideoLanguageModel(VideoLanguageModelConfig(**stages))
    weights = checkpoint["state_dict"].items()
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights})
    return model.eval()


if __name__ == "__main__":
    main()
