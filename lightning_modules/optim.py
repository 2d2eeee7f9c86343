"""Learning rate over the steps of a training."""

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
