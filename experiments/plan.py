"""ropelab-plan: predicts memory, time and cost of a recipe on N ranks before you rent machines.

ropelab-plan experiment=vniah_d_tiny ranks=1,4 device=h100 mfu=0.4
ropelab-plan experiment=ppllava_dpo ranks=8,64,512 data.global_batch_size=512
ropelab-plan experiment=ppllava_vicuna7b_multi_image tiles=llava_next videos=0 images=4

It takes the same words as ropelab-train, reads no weights and no data, and needs no GPU.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import hydra
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.checks.keys import check_keys
from experiments.command.values import check_values
from experiments.planning.forecast import GIB, Forecast, forecast, is_sharded
from experiments.run import process
from experiments.run.compose import plain, user_errors_in_one_line
from experiments.run.hydra_errors import hydra_errors_in_one_line
from lightning_modules.training.preference.reference import FrozenReference

_KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "temporary")


@hydra_errors_in_one_line
@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="plan")
@user_errors_in_one_line
def plan(config: DictConfig) -> None:
    # 1. A forecast for each world size: builds the recipe and its model, and takes one step
    check_keys(config)
    check_values(config)
    device = config.device
    usable = (1 - config.headroom) * device.memory_gib
    forecasts: list[Forecast] = []
    for ranks in config.ranks:
        try:
            forecasts.append(forecast(config, ranks))
        except ValueError as error:
            if len(config.ranks) == 1:
                raise
            print(f"{ranks:>5}  {error}")
            continue
        if len(forecasts) == 1:
            print(_describe(config, forecasts[0]), _HEADER, sep="\n")
        print(_row(forecasts[-1], usable), flush=True)
    if not forecasts:
        raise ValueError(f"none of ranks={plain(config.ranks)} can train it; see above")

    # 2. If it does not fit: advises changes, each with a forecast of its own
    for tight in forecasts:
        if config.advise and tight.gib > usable:
            print(
                f"\n{tight.ranks} ranks need {tight.gib:.3g} GiB each, but {usable:.3g} are usable:"
            )
            _advise(config, tight, usable)


def main() -> None:
    """Plans all values of `ranks=8,64` in one table. Hydra alone would read them as a sweep."""
    process.run_alone("ropelab-plan")
    sys.argv[1:] = [re.sub(r"^ranks=(\d+(,\d+)*)$", r"ranks=[\1]", word) for word in sys.argv[1:]]
    plan()


def _describe(config: DictConfig, first: Forecast) -> str:
    step, device = first.step, config.device
    flops = ", ".join(
        f"{stage} {count / first.batch_size:.3g}" for stage, count in step.flops.items()
    )
    share = step.computed / sum(step.flops.values())
    return "\n".join(
        [
            f"{device.name}: {device.memory_gib} GiB, {config.headroom:.0%} of it kept free; "
            f"{config.mfu:.0%} of {device.peak_flops / 1e12:.0f} TFLOP/s",
            f"{step.parameters / 1e9:.3g} B parameters, {step.trained / 1e9:.3g} B trained; a "
            f"sample: {first.frames} frames, {first.visual_tokens} visual tokens; "
            f"{step.tokens // step.samples} tokens in all",
            f"FLOPs of a sample: {flops}; computed are {share:.2f} times as many",
        ]
    )


_HEADER = (
    f"\n{'ranks':>5} {'step = ranks x batch x times':>28} {'GiB':>7} "
    + " ".join(f"{kind:>11}" for kind in _KINDS)
    + f" {'s/step':>8} {'tokens/s':>10} {'steps':>8} {'GPU-hours':>10}"
)


def _row(found: Forecast, usable: float) -> str:
    share = f"{found.global_batch} = {found.ranks} x {found.batch_size} x {found.accumulation}"
    kinds = " ".join(f"{found.step.memory.get(kind, 0) / GIB:11.2f}" for kind in _KINDS)
    steps = "-" if found.steps is None else f"{found.steps}"
    hours = "-" if found.gpu_hours is None else f"{found.gpu_hours:.1f}"
    verdict = "" if found.gib <= usable else "  does not fit"
    return (
        f"{found.ranks:>5} {share:>28} {found.gib:7.2f} {kinds} {found.seconds:8.3g} "
        f"{found.tokens_per_s:10.0f} {steps:>8} {hours:>10}{verdict}"
    )


class Change(NamedTuple):
    """A change to try.

    Attributes:
        words: words of the command line by key.
        settings: config values that the words set, by dotted key.
        ranks: number of ranks.
    """

    words: dict[str, Any]
    settings: dict[str, Any]
    ranks: int


def _advise(config: DictConfig, tight: Forecast, usable: float) -> None:
    """Tries changes one after another and keeps those that help, until the recipe fits."""
    changed, best = config.copy(), tight
    taken: dict[str, Any] = {}  # by key, because a later word may replace an earlier one
    for change in _changes(config, tight.ranks):
        attempt = changed.copy()
        with open_dict(attempt):
            for key, value in change.settings.items():
                OmegaConf.update(attempt, key, value, force_add=True)
        try:
            found = forecast(attempt, max(best.ranks, change.ranks))
        except ValueError:
            continue  # this stage of training does not allow the change
        if found.gib >= best.gib:
            continue
        changed, best = attempt, found
        taken |= change.words
        fits = best.gib <= usable
        print(
            f"  {' '.join(f'{key}={word}' for key, word in taken.items())}: {best.gib:.3g} GiB, "
            f"{best.seconds:.3g} s a step" + (", fits" if fits else ""),
            flush=True,
        )
        if fits:
            return
    print("  no change that is known here makes it fit: choose a smaller model or fewer frames")


def _changes(config: DictConfig, ranks: int) -> Iterator[Change]:
    """Yields possible changes, the cheapest first."""
    tuning, size = config.get("tuning"), config.data.batch_size
    reference = OmegaConf.select(config, "module.reference._target_")
    if tuning is not None:
        stages = [stage for stage in ("llm", "encoder") if config.model.get(stage)]
        for count in range(1, len(stages) + 1):
            if not set(stages[:count]) <= set(tuning.checkpointing):
                word = f"[{','.join(stages[:count])}]"
                settings = {"tuning.checkpointing": stages[:count]}
                yield Change({"tuning.checkpointing": word}, settings, ranks)
    if reference and issubclass(get_class(reference), FrozenReference):
        yield _option("module/reference", "streamed", {"module.reference": ""}, ranks)
    if ranks > 1 and not is_sharded(config):
        yield _option("trainer", "fsdp", {"trainer.strategy": "strategy"}, ranks)
    for smaller in dict.fromkeys((size // 2, 1)):
        if 0 < smaller < size and size % smaller == 0:
            yield Change({"data.batch_size": smaller}, {"data.batch_size": smaller}, ranks)
    if tuning is not None and not tuning.lora:
        lora = {"tuning.freeze": "freeze", "tuning.lora": "lora"}
        yield _option("tuning", "lora", lora, ranks)
    for more in (2 * ranks, 4 * ranks, 8 * ranks):
        for batch in dict.fromkeys((1, config.data.global_batch_size // more)):
            if ranks > 1 and (batch == 1 or 1 < batch < size):
                words = {"data.batch_size": batch}
                yield Change(words | {"ranks": more}, words, more)


def _option(group: str, name: str, nodes: dict[str, str], ranks: int) -> Change:
    """Returns the change to option `name` of a config group.

    Args:
        nodes: key of the config -> part of the option's file that goes there; "" is the whole file.
    """
    file: Any = OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
    settings = {key: OmegaConf.select(file, part) if part else file for key, part in nodes.items()}
    return Change({group: name}, settings, ranks)


if __name__ == "__main__":
    main()
