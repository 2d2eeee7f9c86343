"""Learning-rate schedules, and early checks of the optimizer."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def schedule(
    optimizer: Optimizer, steps: int, *, name: str = "cosine", warmup: float = 0.03, **options: Any
) -> LRScheduler:
    """Returns one of transformers' schedules; `warmup` is a fraction of all steps.

    `name` is one that `transformers.get_scheduler` knows: cosine, linear, constant_with_warmup, …

    Raises:
        ValueError: `warmup` is not in [0, 1], or there is no such schedule.
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup} must be a share of all steps, from 0 to 1")
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=round(warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options or None,
    )


def follow(
    optimizer: Optimizer, make: Callable[[Optimizer, int], LRScheduler], steps: int, done: int
) -> LRScheduler:
    """Returns a scheduler for `steps` steps, advanced by `done` steps.

    A checkpoint stores the learning rate for the length that the training had then. Repeating the
    steps gives the rate for its length now, so a training can be extended.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    scheduler = make(optimizer, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*lr_scheduler\.step\(\)` before `optimizer\.step")
        for _ in range(done):
            scheduler.step()
    return scheduler


def try_optimizer(
    make_optimizer: Callable[[Any], Optimizer],
    make_scheduler: Callable[[Optimizer, int], Any] | None,
    groups: Mapping[str, Mapping[str, Any] | None],
) -> None:
    """Builds the optimizer and the schedule once, for a single parameter, to find mistakes in them.

    Raises:
        ValueError: one of them cannot be built; the message names the key.
    """
    optimizer = _try(make_optimizer, "optim.optimizer", getattr(make_optimizer, "keywords", {}))
    for part, options in groups.items():
        _try(make_optimizer, f"tuning.groups.{part}", options or {})
    if make_scheduler is not None:
        try:
            make_scheduler(optimizer, 10)
        except Exception as error:
            raise ValueError(f"optim.scheduler: {_first_line(error)}") from None


def _try(make: Callable[..., Optimizer], key: str, options: Mapping[str, Any]) -> Optimizer:
    try:
        return make([nn.Parameter(torch.zeros(1, device="cpu"))], **options)
    except Exception as error:
        named = f"{key}.{name}={options[name]}" if (name := _culprit(make, options)) else key
        raise ValueError(f"{named}: {_first_line(error)}") from None


def _culprit(make: Callable[..., Optimizer], options: Mapping[str, Any]) -> str | None:
    """Returns the first option without which the optimizer can be built, or None."""
    plain: Any = getattr(make, "func", make)
    known = {**getattr(make, "keywords", {}), **options}
    for name in options:
        try:
            plain([nn.Parameter(torch.zeros(1))], **{k: v for k, v in known.items() if k != name})
        except Exception:  # still wrong without this option: another one is to blame
            continue
        return name
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
