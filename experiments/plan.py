"""ropelab-plan: what a recipe takes on so many ranks, before anything is rented.

ropelab-plan experiment=vniah_d_tiny ranks=1,4 device=h100 mfu=0.4
ropelab-plan llm=qwen2_7b encoder=clip_large_336 pooler=average trainer=fsdp ranks=8,64,512

It takes what ropelab-train takes, reads no weights and no data, and needs no GPU.
"""

import re
import sys
from collections.abc import Iterator
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import CONFIG_DIR
from experiments.forecast import GIB, Forecast, forecast, is_sharded
from experiments.run import user_errors_in_one_line

_KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "temporary")


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="plan")
@user_errors_in_one_line
def plan(config: DictConfig) -> None:
    # 1. Every world size on its own: the recipe, its model, one step of it
    device = config.device
    usable = (1 - config.headroom) * device.memory_gib
    forecasts: list[Forecast] = []
    for ranks in config.ranks:
        try:
            forecasts.append(forecast(config, ranks))
        except ValueError as error:
            if not forecasts:
                raise
            print(f"{ranks:>5}  {error}")
            continue
        if len(forecasts) == 1:
            print(_describe(config, forecasts[0]), _HEADER, sep="\n")
        print(_row(forecasts[-1], usable), flush=True)

    # 2. Where it does not fit: what would, planned in the same way
    for tight in forecasts:
        if config.advise and tight.gib > usable:
            print(f"\n{tight.ranks} ranks need {tight.gib:.3g} GiB each, {usable:.3g} are there:")
            _advise(config, tight, usable)


def main() -> None:
    """Hydra takes `ranks=8,64` for a sweep; here it is one plan of two lines."""
    sys.argv[1:] = [re.sub(r"^ranks=(\d+(,\d+)*)$", r"ranks=[\1]", word) for word in sys.argv[1:]]
    plan()


def _describe(config: DictConfig, first: Forecast) -> str:
    step, device = first.step, config.device
    flops = ", ".join(
        f"{stage} {count / first.batch_size:.3g}" for stage, count in step.flops.items()
    )
    twice = step.computed / sum(step.flops.values())
    return "\n".join(
        [
            f"{device.name}: {device.memory_gib} GiB, {config.headroom:.0%} of it kept free; "
            f"{config.mfu:.0%} of {device.peak_flops / 1e12:.0f} TFLOP/s",
            f"{step.parameters / 1e9:.3g} B parameters, {step.trained / 1e9:.3g} B trained; "
            f"a sample: {first.visual_tokens} visual and {first.words} text tokens",
            f"FLOPs of a sample: {flops}; with what is computed twice, {twice:.2f} times as many",
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


def _advise(config: DictConfig, tight: Forecast, usable: float) -> None:
    """Takes one change after the other, each on top of those that helped, until it fits."""
    changed, ranks, best = config.copy(), tight.ranks, tight
    taken: dict[str, str] = {}  # word by key, as a later one may replace an earlier one
    for word, change in _changes(config, ranks):
        attempt, more = changed.copy(), ranks
        with open_dict(attempt):
            for key, value in change.items():
                OmegaConf.update(attempt, key, value, force_add=True)
        if word.startswith("ranks="):
            more = int(word.removeprefix("ranks="))
        found = forecast(attempt, more)
        if found.gib >= best.gib:
            continue
        changed, ranks, best = attempt, more, found
        taken[word.partition("=")[0]] = word
        fits = best.gib <= usable
        print(
            f"  {' '.join(taken.values())}: {best.gib:.3g} GiB, {best.seconds:.3g} s a step"
            + (", fits" if fits else "")
        )
        if fits:
            return
    print("  nothing that is known here makes it fit: take a smaller model or fewer frames")


def _changes(config: DictConfig, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Words of the command line, cheapest first, and the config that each stands for."""
    tuning = config.get("tuning")
    if tuning is not None:
        for stages in (["llm"], ["llm", "encoder"]):
            if not set(stages) <= set(tuning.checkpointing):
                word = f"tuning.checkpointing=[{','.join(stages)}]"
                yield word, {"tuning.checkpointing": stages}
    if ranks > 1 and not is_sharded(config):
        strategy = OmegaConf.load(CONFIG_DIR / "trainer" / "fsdp.yaml").strategy
        yield "trainer=fsdp", {"trainer.strategy": strategy}
    size = config.data.batch_size
    for smaller in (size // 2, 1):
        if 0 < smaller < size and size % smaller == 0:
            yield f"data.batch_size={smaller}", {"data.batch_size": smaller}
    if tuning is not None and not tuning.lora:
        lora = OmegaConf.load(CONFIG_DIR / "tuning" / "lora.yaml")
        yield "tuning=lora", {"tuning.freeze": lora.freeze, "tuning.lora": lora.lora}
    for more in (2, 4, 8):
        if ranks > 1 and config.data.global_batch_size % (ranks * more) == 0:
            yield f"ranks={ranks * more}", {"data.batch_size": 1}


if __name__ == "__main__":
    main()
