"""Saves checkpoints atomically; all ranks learn whether the save has failed."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from lightning_modules.checkpoint.weights import read_checkpoint
from lightning_modules.checkpoint.whole import publish, remove, remove_leftovers


class DiskCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its path, and returns when it is on disk.

    Lightning's own class builds the file in memory, then in `$TMPDIR`, and copies it if that is on
    another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            raise ValueError(
                f"{path} was saved in shards: go on with trainer=fsdp or trainer=fsdp_sim, on any "
                "number of ranks (trainer.devices=1), or start anew with resume=false"
            )
        return read_checkpoint(Path(path), mmap=False)


def save_whole(
    trainer: Trainer, target: Path, previous: Path | None = None, weights_only: bool = False
) -> None:
    """Saves `target`; the old `target` becomes `previous`. All ranks must call it.

    Raises:
        OSError: it cannot be written; raised on all ranks, and earlier files do not change.
    """
    partial = target.with_suffix(".partial")
    failure = None
    if trainer.is_global_zero:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent)
        except OSError as error:
            failure = f"cannot write {target}: {error}"
    _all_fail_alike(trainer, failure)

    written = None
    try:
        trainer.save_checkpoint(partial, weights_only)
    except (OSError, RuntimeError, CheckpointException) as error:
        written = _no_room(error)
        if written is None:
            raise
        trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks wait in this barrier

    if trainer.is_global_zero:
        try:
            if written is None:
                publish(partial, target, previous)
            else:
                failure = _describe(trainer, written, target)
                remove(partial)
        except OSError as error:
            failure = failure or _describe(trainer, error, target)
    _all_fail_alike(trainer, failure)


def _all_fail_alike(trainer: Trainer, failure: str | None) -> None:
    """Raises rank 0's failure on all ranks, so that no rank waits for another."""
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise OSError(failure)


def _no_room(error: BaseException) -> OSError | None:
    """Returns the OSError behind an error; None if a failed write is not the cause.

    After a failed write, PyTorch's writer may only report an unexpected file position. Errors from
    other ranks arrive without their cause.
    """
    cause = None
    for link in _chain(error):
        if isinstance(link, OSError):
            return link
        if isinstance(link, RuntimeError) and "inline_container" in str(link):
            cause = OSError(errno.EIO, "writing failed")
    return cause


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failed, _ in error.failures.values():
                yield from _chain(failed)
        error = error.__cause__ or error.__context__


def _describe(trainer: Trainer, error: OSError, target: Path) -> str:
    free = shutil.disk_usage(target.parent).free
    return (
        f"cannot save {target} ({error.strerror}): a checkpoint needs {_bytes(_size(trainer))}, "
        f"but only {_bytes(free)} are free; what was saved before is complete: free some space, "
        "then run the same command to go on from it"
    )


def _size(trainer: Trainer) -> int:
    """Returns the bytes of weights and optimizer state, which are nearly the whole checkpoint."""
    tensors = list(trainer.lightning_module.state_dict().values())
    for optimizer in trainer.optimizers:
        tensors += [v for state in optimizer.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
