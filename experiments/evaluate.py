"""ropelab-evaluate: tests a trained model with its own components and, if asked, another grid.

The data decides the test: needle tests for data with needles, scores for data with questions. An
encoder that was trained alone (module=clip_context) is tested on recall.

ropelab-evaluate run=runs/vniah_d_tiny/videorope-seed0 data.grid.frames=[24,512]
ropelab-evaluate run=runs/run/videorope-seed0 data.val=held-out/ scores=[mc,hallucer]
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning
from lightning import LightningDataModule, Trainer
from omegaconf import DictConfig
from torch import nn

from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.checks.keys import check_keys
from experiments.checks.replay import read_replay
from experiments.checks.which_run import check_run
from experiments.command.values import check_values
from experiments.console.bars import no_bars_in_files
from experiments.console.results import short_path, tell_results
from experiments.directory.run_directory import RunDirectory
from experiments.run import process
from experiments.run.compose import build, build_all, plain, print_config, user_errors_in_one_line
from experiments.run.hydra_errors import hydra_errors_in_one_line
from experiments.testing import score_answers, test_needles
from lightning_modules.checkpoint.weights import Saved, open_saved
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.contrast import ClipContextModule

logger = logging.getLogger(__name__)


def main() -> None:
    """Evaluates a run with the components it was trained with.

    `rotary` and `positions` have no weights, so the user may name others.
    """
    typed = _flags_last(sys.argv[1:])
    asking = any(word.startswith("-") and word not in _NOT_ASKING for word in typed)
    if not asking and not any(word.startswith("run=") for word in typed):
        sys.exit("error: which run? ropelab-evaluate run=FOLDER")
    try:
        if not asking:
            check_run(Path([w for w in typed if w.startswith("run=")][-1][4:].strip("'\"")))
        replay = read_replay(typed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    named = replaced_parts(replay.typed)
    sys.argv[1:] = [*replay.words, *replay.typed]

    @hydra_errors_in_one_line
    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="evaluate")
    @user_errors_in_one_line
    def evaluate(config: DictConfig) -> float | None:
        # 1. The trained model. Of the classes that its directory names, only allowed ones are built
        no_bars_in_files()
        replay.check(config)
        check_keys(config, replay.typed)
        check_values(config)
        run = Path(config.run)
        stage = build(config.module, "module")(model=plain(config.model))
        if isinstance(stage, ClipContextModule):
            model, step = None, load_encoder(run, stage)
        else:
            model, step = load(run, {part: plain(config.model)[part] for part in named})
        folder = RunDirectory(config)
        print_config(config)
        lightning.seed_everything(config.seed, workers=True, verbose=False)

        # 2. The data and the trainer
        datamodule = build(config.data, "data")
        callbacks = build_all({"progress": config.callbacks.get("progress")}, "callbacks")
        loggers = build_all(config.logger, "logger")
        trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)
        process.refuse_lone_ranks(trainer.world_size)
        with folder.claim():
            for made in trainer.loggers:
                made.log_hyperparams(plain(config))

            # 3. The test: recall of an encoder; else needle tests and scores, as the data has them
            if model is None:
                score = measure_recall(config, trainer, stage, datamodule)
            else:
                score = test_needles(config, trainer, model, datamodule, step)
                score_answers(config, trainer, model, datamodule, step)
        folder.finish(step, score)
        tell_results(folder.path, [f"ropelab-report {short_path(folder.path.parent)}"])
        return score

    with replay.guard():
        evaluate()


#: Options of Hydra that change where configs come from or how many runs there are.
_NOT_ASKING = ("-m", "--multirun", "-cd", "--config-dir")


def _flags_last(words: Sequence[str]) -> list[str]:
    """Returns the words with `--config-dir FOLDER` at the end: Hydra takes no override after it."""
    first = next((n for n, word in enumerate(words) if word in ("-cd", "--config-dir")), len(words))
    return [*words[:first], *words[first + 2 :], *words[first : first + 2]]


def replaced_parts(typed: Sequence[str]) -> list[str]:
    """Returns the parts of the trained model that typed words replace: those without weights.

    Exits with an error if they name a pooler, which is always that of the checkpoint.
    """
    words = [word.lstrip("+") for word in typed]
    if other := [word for word in words if word.startswith(("pooler=", "model.pooler"))]:
        sys.exit(f"error: {other[0]}: the pooler is that of the checkpoint; leave it out")
    return [
        part
        for part, groups in (("rotary", ("rotary=", "scaling=")), ("positions", ("positions=",)))
        if any(word.startswith((*groups, f"model.{part}")) for word in words)
    ]


def load(
    run: Path, replaced: Mapping[str, Any] | None = None, name: str | None = None
) -> tuple[VideoLanguageModel, int]:
    """Returns the trained model and its number of training steps.

    Args:
        run: a run directory, or a folder that `from_pretrained` opens.
        replaced: specs of components that replace the trained ones, by component.
        name: file name of the checkpoint; by default the newest complete one.

    Raises:
        ValueError: there is no checkpoint, or its weights do not fit its components.
    """
    if (run / "config.json").is_file():
        return VideoLanguageModel.from_pretrained(run, **(replaced or {})).eval(), 0
    saved = open_saved(run, "run", name)
    stages = saved.specs
    if "llm" not in stages:
        raise ValueError(
            f"{saved.path} holds {', '.join(stages)} alone, as module=clip_context trains it: "
            f"start the training of an llm from it with init={run}, or measure its recall with "
            f"ropelab-evaluate run={run} experiment=clip_context"
        )
    for part, asked in (replaced or {}).items():
        if asked != stages[part]:
            logger.warning(
                "model.%s: trained with %s, but evaluated with %s, as asked",
                part,
                stages[part],
                asked,
            )
            stages = {**stages, part: asked}
    model = VideoLanguageModel(VideoLanguageModelConfig(**stages))
    _fill(model, saved)
    return model.eval(), saved.checkpoint["global_step"]


def load_encoder(run: Path, stage: ClipContextModule) -> int:
    """Loads the encoder that was trained in `run` into `stage`; returns its training steps.

    Raises:
        ValueError: there is no checkpoint, or it comes from another stage of training.
    """
    saved = open_saved(run, "run")
    stage.on_load_checkpoint(saved.checkpoint)  # refuses others
    stage.spec, stage.resumed = dict(saved.specs), True
    _fill(stage.network, saved)
    return saved.checkpoint["global_step"]


def measure_recall(
    config: DictConfig, trainer: Trainer, stage: ClipContextModule, datamodule: LightningDataModule
) -> float:
    """Returns the share of captions in `data.val` whose own visual is the most similar one."""
    if not config.data.get("val"):
        raise ValueError("recall needs captions: set data.val to shards that have some")
    (metrics,) = trainer.validate(stage, datamodule=datamodule, verbose=False)
    return metrics["val/t2i_r1"]


def _fill(network: nn.Module, saved: Saved) -> None:
    try:
        network.load_state_dict(saved.weights)
    except RuntimeError as error:
        raise ValueError(f"{saved.path} does not fit its own components: {error}") from None


if __name__ == "__main__":
    main()
