"""ropelab-train: composes a run out of one word per stage, trains it and tests it.

ropelab-train experiment=vniah_d_tiny rotary=mrope
ropelab-train -m experiment=vniah_d_tiny rotary=vanilla,tad,mrope,videorope seed=0,1
"""

import hydra
import lightning
import wandb
from omegaconf import DictConfig

from experiments import CONFIG_DIR
from experiments.needles import test_needles
from experiments.run import build, build_all, open_run_directory, plain, user_errors_in_one_line


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
@user_errors_in_one_line
def main(config: DictConfig) -> float | None:
    # 1. Where everything of this run goes, and from which seed it comes
    folder = open_run_directory(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)

    # 2. The model: stages are specs until the strategy asks for them; mistakes in them show here
    module = build(config.module, "module")(model=plain(config.model))
    module.check()

    # 3. The data
    datamodule = build(config.data, "data")

    # 4. The trainer with its callbacks and loggers
    loggers = build_all(config.logger, "logger")
    for logger in loggers:
        logger.log_hyperparams(plain(config))
    callbacks = build_all(config.callbacks, "callbacks")
    trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)

    # 5. Training, from where the run directory says it stands
    last = folder / "checkpoints" / "last.ckpt"
    resumed = str(last) if config.resume and last.exists() else None
    trainer.fit(module, datamodule=datamodule, ckpt_path=resumed)

    # 6. The test, and the number that a sweep compares
    score = test_needles(config, trainer, module.network, datamodule) if config.test else None
    wandb.finish()
    return score


if __name__ == "__main__":
    main()
