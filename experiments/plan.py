"""ropelab-plan: predicts memory, time and cost of a recipe on N ranks before you rent machines.

ropelab-plan experiment=videorope_qwen2_7b ranks=16,64 device=all
ropelab-plan experiment=vniah_d_tiny ranks=1,4 device=h100 mfu=0.4
ropelab-plan experiment=videorope_qwen2_7b data=vniah eval=vniah_d trainer.precision=bf16-true
ropelab-plan experiment=ppllava_dpo ranks=8,64,512 data.global_batch_size=512
ropelab-plan experiment=ppllava_vicuna7b_multi_image tiles=llava_next videos=0 images=4

It takes the same words as ropelab-train, reads no weights and no data, and needs no GPU.
"""

import re
import sys

import hydra
from omegaconf import DictConfig

from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.checks.keys import check_keys
from experiments.command.values import check_values
from experiments.planning.advice import advise
from experiments.planning.forecast import Forecast, check_plan, default_ranks, forecast, usable
from experiments.planning.needle_test import forecast_needles
from experiments.planning.tables import (
    HEADER,
    count,
    describe,
    describe_test,
    devices_table,
    progress,
    row,
)
from experiments.run import process
from experiments.run.compose import plain, user_errors_in_one_line
from experiments.run.hydra_errors import hydra_errors_in_one_line


@hydra_errors_in_one_line
@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="plan")
@user_errors_in_one_line
def plan(config: DictConfig) -> None:
    # 1. A forecast for each world size: builds the recipe and its model, and takes one step
    check_keys(config)
    check_values(config)
    check_plan(config)
    if config.ranks is None:
        config.ranks = [default_ranks(config)]
    forecasts: list[Forecast] = []
    for ranks in config.ranks:
        try:
            with progress(f"plans {count(ranks, 'rank')}"):
                forecasts.append(forecast(config, ranks))
        except ValueError as error:
            if len(config.ranks) == 1:
                raise
            print(f"{ranks:>5}  {error}")
            continue
        if len(forecasts) == 1:
            print(describe(config, forecasts[0]), HEADER, sep="\n")
        print(row(forecasts[-1], None if config.every_device else usable(config)), flush=True)
    if not forecasts:
        raise ValueError(f"none of ranks={plain(config.ranks)} can train it; see above")

    # 2. The needle test of the recipe, if its data has one
    if config.data.get("grid"):
        with progress("plans the needle test"):
            test = forecast_needles(config)
        print(describe_test(config, test), flush=True)

    # 3. device=all: a table of all devices for each world size
    if config.every_device:
        for found in forecasts:
            print(devices_table(config, found))
        return

    # 4. If it does not fit: advises changes, each with a forecast of its own
    for tight in forecasts:
        if config.advise and tight.gib > usable(config):
            print(
                f"\n{count(tight.ranks, 'rank')} need {tight.gib:.3g} GiB each, but "
                f"{usable(config):.3g} are usable:"
            )
            for line in advise(config, tight, usable(config)):
                print(f"  {line}", flush=True)


def main() -> None:
    """Plans all values of `ranks=8,64` in one table. Hydra alone would read them as a sweep."""
    process.run_alone("ropelab-plan")
    words = [re.sub(r"^ranks=(\d+(,\d+)*)$", r"ranks=[\1]", word) for word in sys.argv[1:]]
    sys.argv[1:] = ["every_device=true" if word == "device=all" else word for word in words]
    plan()


if __name__ == "__main__":
    main()
