"""A Hydra callback that creates and checks the directory of a run before Hydra does."""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.checks.keys import check_keys
from experiments.private.hydra import combinations
from experiments.run.files import check_files, printable
from experiments.run.made import make
from experiments.run.process import fail, process_rank


class MakeFolder(Callback):
    """Creates the directory of a run or sweep. If that fails, the program ends with one line.

    Hydra would also create it, but would show a traceback.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _make(config, "run", "hydra.run.dir=…, or another folder for all runs with paths.runs=…")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_first_job(config)
        if config.hydra.sweeper._target_.endswith(".ListingSweeper"):
            return  # a dry run writes nothing
        _make(
            config, "sweep", "hydra.sweep.dir=…, or another folder for all runs with paths.runs=…"
        )


def _check_first_job(config: DictConfig) -> None:
    """Checks the keys of a sweep's first job. Later, frozen configs have no interpolations left."""
    if config.hydra.job.config_name != "train":
        return  # another program, with keys of its own
    words = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    try:
        check_keys(hydra.compose(config.hydra.job.config_name, combinations(words)[0]))
    except ValueError as error:
        fail(f"error: {error}", process_rank())


def _make(config: DictConfig, kind: str, ways_out: str) -> None:
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        folder = Path(config.hydra[kind].dir)
    except OmegaConfBaseException:
        return  # a missing value, which Hydra reports itself
    finally:
        HydraConfig.instance().cfg = before
    try:
        make(folder)
        if kind == "run":
            check_files(folder)  # before Hydra opens its log there
        return
    except ValueError as error:
        line = f"error: {printable(str(error))}"
    except OSError as error:
        line = (
            f"error: {folder} cannot be created ({error.strerror}): choose another with {ways_out}"
        )
    fail(line, process_rank())
