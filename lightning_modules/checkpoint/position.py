"""Adjusts the loop counters of Lightning in checkpoints, so that any number of ranks can resume."""

from typing import Any

from lightning import Trainer

from lightning_modules.private.lightning import (
    accumulates,
    begin_next_epoch,
    validation_is_next,
)

_COUNTERS = ("ready", "started", "processed", "completed")


def rescale(checkpoint: dict[str, Any], world_size: int) -> None:
    """Converts Lightning's counters, which count the micro-batches of one rank, to `world_size`.

    Raises:
        ValueError: the number of micro-batches of all ranks is not divisible by `world_size`, so
            the checkpoint was not saved at the end of a step of this global batch size.
    """
    then = checkpoint.get("world_size", world_size)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["processed"] * then
    if done % world_size:
        raise ValueError(
            f"the checkpoint was saved after {done} micro-batches ({then} ranks), which "
            f"{world_size} ranks cannot share: resume with a number of ranks that divides {done}"
        )
    for counts in (progress["current"], progress["total"]):
        processed = counts["processed"] * then // world_size
        # Within a batch, one counter is one batch ahead of another, for any number of ranks.
        shift = processed - counts["processed"]
        for name in _COUNTERS:
            counts[name] += shift


def mark_validation_due(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Lets a run that resumes at the end of a batch validate, if validation is next.

    Lightning treats a validation without any processed batch as finished. So the checkpoint is
    changed as if it was saved at the first validation batch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    ends_batch = progress["current"]["completed"] == progress["current"]["processed"] - 1
    if not (ends_batch and validation_is_next(trainer)):
        return
    for counts in (progress["current"], progress["total"]):
        counts["completed"] += 1
    seen = loops["epoch_loop.val_loop.batch_progress"]
    before = seen["total"]["completed"]
    seen["current"] = dict.fromkeys(_COUNTERS, 0)
    seen["total"] = dict.fromkeys(_COUNTERS, before) | {"ready": before + 1, "started": before + 1}


def leave_epoch_open(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Lets a run that ended within an epoch, by `max_steps` or a callback, resume within it.

    Lightning treats such an epoch as finished and skips its other batches. So the checkpoint is
    changed as if it was saved at the end of a batch, after its validation.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]
    if trainer.is_last_batch or epochs["current"]["processed"] != epochs["current"]["started"]:
        return
    batches = loops["epoch_loop.batch_progress"]
    for span in ("current", "total"):
        epochs[span]["processed"] -= 1
        batches[span]["completed"] -= 1
    if not accumulates(trainer):  # Lightning counts it after the end of a batch
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def close_epoch(trainer: Trainer) -> None:
    """Lets a run that resumes at the end of an epoch begin the next one; call it at the start.

    With `max_steps`, Lightning would continue the finished epoch, and count an epoch without
    batches.
    """
    if trainer.fit_loop.restarted_on_epoch_end:
        begin_next_epoch(trainer)
