"""Learning rate over the steps of a training."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def schedule(
    optimizer: Optimizer, steps: int, *, name: str = "cosine", warmup: float = 0.03, **options: Any
) -> LRScheduler:
    """One of transformers' schedules, its warm-up given as a share of all steps.

    `name` is one that `transformers.get_scheduler` knows: cosine, linear, constant_with_warmup, …
    """
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
    """Returns a scheduler for `steps` steps that stands after the first `done` of them.

    A checkpoint keeps the learning rate of the length that its training had then. Going through the
    steps anew gives that of the length it has now, also where the training was extended.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    scheduler = make(optimizer, steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*lr_scheduler\.step\(\)` before `optimizer\.step")
        for _ in range(done):
            scheduler.step()
    return scheduler
