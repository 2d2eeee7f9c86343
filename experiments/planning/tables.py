"""The lines that ropelab-plan prints."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, OmegaConf

from experiments import CONFIG_DIR
from experiments.planning.forecast import GIB, Forecast, samples_of, usable
from experiments.planning.needle_test import NeedleForecast

_KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "temporary")

HEADER = (
    f"\n{'ranks':>5} {'step = ranks x batch x times':>28} {'GiB':>7} "
    + " ".join(f"{kind:>11}" for kind in _KINDS)
    + f" {'s/step':>8} {'tokens/s':>10} {'steps':>8} {'GPU-hours':>10} {'an epoch':>9} "
    + f"{'calendar':>9}"
)


def describe(config: DictConfig, first: Forecast) -> str:
    """Returns what is planned: the device, the model, a sample, and the data."""
    step, device = first.step, config.device
    flops = ", ".join(
        f"{stage} {number / first.batch_size:.3g}" for stage, number in step.flops.items()
    )
    share = step.computed / sum(step.flops.values())
    name = "the memory of each device" if config.every_device else f"{device.memory_gib} GiB"
    speed = "its peak" if config.every_device else f"{device.peak_flops / 1e12:.0f} TFLOP/s"
    return "\n".join(
        [
            f"{'all devices' if config.every_device else device.name}: {name}, "
            f"{config.headroom:.0%} of it kept free; {config.mfu:.0%} of {speed}",
            f"{step.parameters / 1e9:.3g} B parameters, {step.trained / 1e9:.3g} B trained; a "
            f"sample: {first.frames} frames, {first.visual_tokens} visual tokens; "
            f"{step.tokens // step.samples} tokens in all",
            f"FLOPs of a sample: {flops}; computed are {share:.2f} times as many",
            _data(config),
        ]
    )


def _data(config: DictConfig) -> str:
    samples = samples_of(config)
    if samples is None:
        return "data: the recipe states no number of samples; samples=N gives steps and hours"
    source = "as typed" if config.samples else "as the recipe says; samples=N changes it"
    limit = config.trainer.get("max_steps") or -1
    length = count(limit, "step") if limit > 0 else count(config.trainer.max_epochs or 1, "epoch")
    return f"data: {count(samples, 'sample')} an epoch ({source}), {length}"


def row(found: Forecast, usable_gib: float | None) -> str:
    """Returns the line of one number of ranks.

    Args:
        usable_gib: memory of the device; None: there are several devices.
    """
    share = f"{found.global_batch} = {found.ranks} x {found.batch_size} x {found.accumulation}"
    kinds = " ".join(f"{found.step.memory.get(kind, 0) / GIB:11.2f}" for kind in _KINDS)
    fits = usable_gib is None or found.gib <= usable_gib
    times = f"{found.seconds:8.3g} {found.tokens_per_s:10.0f}"
    lengths = f"{_number(found.steps):>8} {_hours(found)}"
    if usable_gib is None:
        times, lengths = f"{'-':>8} {'-':>10}", f"{_number(found.steps):>8} {_hours(None)}"
    verdict = "" if fits else "  does not fit"
    return f"{found.ranks:>5} {share:>28} {found.gib:7.2f} {kinds} {times} {lengths}{verdict}"


def devices_table(config: DictConfig, found: Forecast) -> str:
    """Returns a table with a line for each device of `configs/device`."""
    lines = [
        f"\n{count(found.ranks, 'rank')}, {found.gib:.3g} GiB each:",
        f"  {'device=':<10} {'usable':>7} {'fits':>5} {'s/step':>8} {'tokens/s':>10} "
        f"{'GPU-hours':>10} {'an epoch':>9} {'calendar':>9}",
    ]
    for path in sorted((CONFIG_DIR / "device").glob("*.yaml")):
        device = OmegaConf.load(path)
        there = found.on(config.mfu, device.peak_flops)
        room = (1 - config.headroom) * device.memory_gib
        lines.append(
            f"  {path.stem:<10} {room:7.1f} {'yes' if found.gib <= room else 'no':>5} "
            f"{there.seconds:8.3g} {there.tokens_per_s:10.0f} {_hours(there)}"
        )
    return "\n".join(lines)


def describe_test(config: DictConfig, test: NeedleForecast) -> str:
    """Returns the lines about a needle test."""
    kinds = ", ".join(f"{name} {size / GIB:.3g}" for name, size in test.memory.items())
    title = (
        f"\nneedle test on 1 GPU: {test.rows:,} rows; the longest has {test.frames:,} frames, "
        f"{test.tokens:,} tokens"
    )
    memory = f"  {test.peak / GIB:.3g} GiB at the peak, in the longest row: {kinds}"
    if config.every_device:
        return f"{title}\n{memory}"
    speed = config.mfu * config.device.peak_flops
    verdict = "" if test.peak / GIB <= usable(config) else ": does not fit"
    return "\n".join(
        [
            title,
            f"{memory}; {usable(config):.3g} usable{verdict}",
            f"  the longest row takes {test.row_flops / speed:.3g} s, all rows take "
            f"{as_time(test.flops / speed / 3600)}; without shared beginnings they would take "
            f"{as_time(test.unshared_flops / speed / 3600)}",
        ]
    )


def cost(found: Forecast) -> str:
    """Returns memory, time of a step, and cost of the whole training."""
    text = f"{found.gib:.3g} GiB, {found.seconds:.3g} s a step"
    if found.gpu_hours is None or found.hours is None:
        return text
    return f"{text}, {_number(found.gpu_hours)} GPU-hours, {as_time(found.hours)}"


def _hours(found: Forecast | None) -> str:
    """Returns the cells of GPU-hours, GPU-hours of an epoch, and calendar time."""
    if found is None or found.hours is None:
        epoch = None if found is None else found.epoch_gpu_hours
        return f"{'-':>10} {_number(epoch):>9} {'-':>9}"
    total, epoch = _number(found.gpu_hours), _number(found.epoch_gpu_hours)
    return f"{total:>10} {epoch:>9} {as_time(found.hours):>9}"


def as_time(hours: float) -> str:
    """Returns a duration in minutes, hours or days: `12 min`, `7.5 h`, `3.2 days`."""
    if hours < 1:
        return f"{60 * hours:.0f} min" if hours > 1 / 60 else "< 1 min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def count(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 rank`, `8 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Says on stderr what the program does inside the context; a terminal forgets it afterwards."""
    began, terminal = time.monotonic(), sys.stderr.isatty()
    print(f"{text} …", end="" if terminal else "\n", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif (took := time.monotonic() - began) > 60:
            print(f"{text}: {took:.0f} s", file=sys.stderr, flush=True)
