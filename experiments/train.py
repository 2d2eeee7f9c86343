"""ropelab-train: composes a run from one word per component, then trains and tests the model.

ropelab-train experiment=vniah_d_tiny rotary=mrope
ropelab-train -m experiment=vniah_d_tiny rotary=vanilla,tad,mrope,videorope seed=0,1
"""

import hydra
import lightning
from omegaconf import DictConfig, OmegaConf

from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.checks.keys import check_keys
from experiments.checks.place import AfterFirstStep, check_place
from experiments.command.values import check_values
from experiments.console.bars import no_bars_in_files
from experiments.console.opening import Opening
from experiments.console.results import next_commands, tell_results
from experiments.directory.run_directory import RunDirectory
from experiments.run import process
from experiments.run.compose import (
    axes,
    build,
    build_all,
    plain,
    print_config,
    share_steps,
    user_errors_in_one_line,
)
from experiments.testing import score_last_weights, test_needles
from lightning_modules.checkpoint import weights


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
@user_errors_in_one_line
def main(config: DictConfig) -> float | None:
    # 1. The run directory and the seed. A finished run ends here. Nothing is written before step 5.
    no_bars_in_files()
    check_keys(config)
    check_values(config)
    folder = RunDirectory(config)
    if done := folder.finished():
        print(f"already finished: {folder.path / 'done.json'}")
        tell_results(folder.path, next_commands(folder.path, config.module._target_))
        return done["metrics"].get("score")
    print_config(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)

    # 2. The model: components stay specs until the strategy builds them, but are checked here
    module = build(config.module, "module")(model=plain(config.model))
    checkpoint = folder.checkpoint
    module.resumed = checkpoint is not None
    module.check()
    module.check_optimizer()

    # 3. The data
    datamodule = build(config.data, "data")

    # 4. The trainer, callbacks and loggers. The global batch size sets the gradient accumulation.
    loggers = build_all(config.logger, "logger")
    own = [AfterFirstStep(folder.keep), Opening(config, folder.path)]
    callbacks = [*own, *build_all(config.callbacks, "callbacks")]
    trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)
    process.refuse_lone_ranks(trainer.world_size)
    share_steps(trainer, datamodule)
    module.check_sharing(datamodule, trainer.world_size, trainer.accumulate_grad_batches)

    # 5. Makes the data if the recipe does so, and checks that it is the checkpoint's data. This is
    # the last check that can refuse the run.
    build(config.prepare, "prepare")
    check_place(checkpoint, trainer, datamodule)
    with folder.claim():
        for logger in trainer.loggers:
            logger.log_hyperparams(plain(config) | {"choice": axes(config)})

        # 6. Training, resumed from the checkpoint if there is one
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)

    # 7. The test. A sweep compares its score.
    steps = trainer.global_step
    score = None
    if config.test:
        score = test_needles(config, trainer, module.network, datamodule, steps)
        score_last_weights(config, trainer, module, datamodule)
    samples, digest = module.step_loss.samples, weights.sha256(module.network)
    if OmegaConf.select(config, "callbacks.checkpoint"):  # a debugging run keeps nothing
        folder.finish(steps, score, samples=samples, weights_sha256=digest)
        tell_results(folder.path, next_commands(folder.path, config.module._target_))
    return score


if __name__ == "__main__":
    main()
