"""The contract of a datamodule, and what our own datamodules share."""

from abc import abstractmethod
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from transformers import PreTrainedTokenizerBase

from datamodules.sample.outline import Outline
from datamodules.stream.loader import Faults, trained_on
from datamodules.stream.order import divisors, listed


class VideoDataModule(LightningDataModule):
    """Everything that a module, a callback or a program may ask of a datamodule.

    A datamodule of your own gives a `tokenizer` and Lightning's loaders, and calls
    `super().__init__`. The rest has defaults.

    Attributes:
        batch_size: samples of one batch of one rank: the micro-batch.
        global_batch_size: samples of an optimizer step, all ranks together.
        audit: callbacks write down the sample keys of every step.
        faults: bad samples by split. It may stay empty.

    Args:
        batch_size: as above.
        global_batch_size: as above; None is one micro-batch.
        audit: as above.

    Raises:
        ValueError: the sizes do not divide; the message names sizes that do.
    """

    def __init__(self, batch_size: int, global_batch_size: int | None = None, audit: bool = False):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}; set it to 1 or more")
        self.batch_size = batch_size
        self.global_batch_size = batch_size if global_batch_size is None else global_batch_size
        self.audit = audit
        self.faults: dict[str, Faults] = {}
        self._check_world(1)

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the LLM. Callbacks write prompts and answers as text with it."""

    @property
    def per_step(self) -> int:
        """Number of micro-batches per optimizer step, over all ranks."""
        return self.global_batch_size // self.batch_size

    def accumulation(self, world: int) -> int:
        """Returns the gradient accumulation: micro-batches per rank and optimizer step.

        Raises:
            ValueError: the sizes do not divide; the message names sizes that do.
        """
        self._check_world(world)
        return self.per_step // world

    def _check_world(self, world: int) -> None:
        size, batch = self.global_batch_size, self.batch_size
        if size > 0 and size % (batch * world) == 0:
            return
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        what = f"data.global_batch_size={size} with data.batch_size={batch} on {ranks}"
        if size < 1 or size % world:
            advice = f"legal global batch sizes: multiples of {batch * world}"
            if size > 0 and size % batch == 0:
                advice += f"; legal numbers of ranks: {listed(divisors(size // batch))}"
        else:
            advice = f"legal batch sizes for {ranks}: {listed(divisors(size // world))}"
        raise ValueError(f"{what}: {size} is not a multiple of {batch} x {world}; {advice}")

    @property
    def trained_samples(self) -> int:
        """Number of samples that all ranks have trained on since the training began."""
        steps = self.trainer.global_step if self.trainer else 0
        return steps * self.global_batch_size

    @property
    def even(self) -> bool:
        """True if every training batch has `batch_size` samples."""
        return True

    @property
    def bank(self) -> torch.Tensor:
        """Frames (n c h w) uint8 that a needle test shows its cells from.

        Raises:
            ValueError: the datamodule has no needle test.
        """
        raise ValueError(f"{type(self).__name__} has no needle test: choose data=vniah")

    def describe(self) -> dict[str, Any]:
        """Returns what the scores of a validation depend on, beside the model; plain containers."""
        return {"data": self.fingerprint()}

    def settings(self) -> dict[str, str]:
        """Returns what log-probabilities depend on, beside the model: a digest by name."""
        return {}

    def fingerprint(self) -> str:
        """Returns what the order of samples depends on, in words: `data 5d41... seed 0 ...`."""
        return f"data {type(self).__name__}"

    def check(self, state_dict: dict[str, Any]) -> None:
        """Compares the stream of a checkpoint with this one. Needs no trainer.

        Raises:
            ValueError: they are not the same.
        """

    def outlined(self, outline: Outline) -> Any:
        """Returns a training batch of as many samples of these sizes as one can have.

        Raises:
            ValueError: the datamodule cannot be planned.
        """
        raise ValueError(
            f"ropelab-plan needs the method `outlined`, which {type(self).__name__} does not have"
        )


def datamodule_of(trainer: Trainer) -> VideoDataModule:
    """Returns the datamodule that a trainer runs.

    Raises:
        ValueError: it is none of ours, or there is none.
    """
    found = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(found, VideoDataModule):
        name = type(found).__name__
        raise ValueError(
            f"{name} is not a VideoDataModule: derive it from datamodules.base.VideoDataModule"
        )
    return found


class StepsDataModule(VideoDataModule):
    """Knows where the training stands in its stream, and keeps that in checkpoints.

    Args:
        batch_size: as in `VideoDataModule`, as are the next two.
        on_changed: `stop` refuses the checkpoint of another stream, `go_on` takes it.
        key: of `on_changed`, for what a user reads.
    """

    def __init__(
        self, batch_size: int, global_batch_size: int | None, audit: bool, on_changed: str, key: str
    ):
        super().__init__(batch_size, global_batch_size, audit)
        if on_changed not in ("stop", "go_on"):
            raise ValueError(f"{key} is {on_changed!r}; set it to 'stop' or 'go_on'")
        self._go_on, self._key = on_changed == "go_on", key
        self._batches = 0  # trained on in an epoch, all ranks together
        self._restored: tuple[int, int] | None = None

    @property
    def trained_samples(self) -> int:
        """Number of samples that all ranks together have trained on since training began."""
        return self._samples_before(*trained_on(self.trainer))

    def _end_in_steps(self, batches: int, ranks: int) -> None:
        """Makes the trainer end epochs and validate only at the end of an optimizer step.

        Lightning counts the micro-batches of one rank. This method rounds fractions of an epoch
        to whole optimizer steps, so their number does not depend on the number of ranks.

        Args:
            batches: micro-batches per epoch, over all ranks.

        Raises:
            ValueError: the validation interval is longer than an epoch.
        """
        self._batches, trainer = batches, self.trainer
        if trainer is None:
            return
        limit, interval = (
            getattr(trainer, name, 1.0) for name in ("limit_train_batches", "val_check_interval")
        )  # the trainer has no such attribute if the interval is a time
        mine = batches // ranks
        if isinstance(limit, float) and 0 < limit < 1:
            limit = share_of(mine, limit, trainer.accumulate_grad_batches)
            trainer.limit_train_batches = limit
        if isinstance(limit, int):
            mine = min(mine, limit)
            self._batches = mine * ranks
        if isinstance(interval, float) and interval < 1 and mine:
            trainer.val_check_interval = share_of(mine, interval, trainer.accumulate_grad_batches)
        elif isinstance(interval, int) and interval > mine and _validates_by_epoch(trainer):
            per_step = trainer.accumulate_grad_batches
            raise ValueError(
                f"trainer.val_check_interval={interval // per_step} optimizer steps is longer than "
                f"an epoch, which has {mine // per_step}: set it to {mine // per_step} or less, to "
                "1.0 for the end of each epoch, or count across epochs with "
                "trainer.check_val_every_n_epoch=null"
            )

    def _samples_before(self, epoch: int, micro_batches: int) -> int:
        return (epoch * self._batches + micro_batches) * self.batch_size

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns everything that the sample order depends on: `data 5d41... seed 0 ...`."""

    @abstractmethod
    def outlined(self, outline: Outline) -> Any:
        """Returns the largest possible training batch of samples of these sizes."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the stream position of the training. It is the same on all ranks.

        `micro_batches` counts this epoch over all ranks. `faults` counts the bad samples of all
        ranks since training began.
        """
        epoch, done = trained_on(self.trainer)
        counts = self.faults["train"]
        faults = dict(counts.agreed + counts.new)
        return {
            "fingerprint": self.fingerprint(),
            "validation": self.validation_fingerprint(),
            "epoch": epoch,
            "micro_batches": done,
            "faults": faults,
        }

    def validation_fingerprint(self) -> str | None:
        """Returns a fingerprint of the validation shards, or None if there are none."""
        return None

    def check(self, state_dict: dict[str, Any]) -> None:
        """Compares the stream of a checkpoint with this one. Needs no trainer.

        Raises:
            ValueError: the streams differ, and `on_changed` does not allow that.
        """
        then, now = state_dict["fingerprint"], self.fingerprint()
        if self._go_on:
            return
        ways_out = (
            "undo the change, start anew with resume=false, or go on with the new {} by "
            f"{self._key}=go_on"
        )
        if then != now:
            changed = "shards" if then.split()[1] != now.split()[1] else "settings"
            raise ValueError(
                f"the {changed} of the data changed since the checkpoint, from `{then}` to "
                f"`{now}`: {ways_out.format('order')}"
            )
        before, validation = state_dict.get("validation"), self.validation_fingerprint()
        if before is not None and before != validation:
            raise ValueError(
                f"the shards of data.val changed since the checkpoint, from {before} to "
                f"{validation}: {ways_out.format('ones')}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the counts of bad samples. The trainer restores the stream position itself.

        Raises:
            ValueError: the stream is not the one of the checkpoint.
        """
        self.check(state_dict)
        then, now = state_dict["fingerprint"], self.fingerprint()
        self.faults["train"].agreed.clear()
        self.faults["train"].merge([state_dict["faults"]])
        if then == now:
            self._restored = state_dict["epoch"], state_dict["micro_batches"]

    def _position(self) -> tuple[int, int]:
        """Returns the stream position: (epoch, micro-batches of all ranks done in it).

        Raises:
            ValueError: the trainer continues from another stream position than the checkpoint's.
        """
        here, restored, self._restored = trained_on(self.trainer), self._restored, None
        count = [place[0] * self._batches + place[1] for place in (here, restored or here)]
        if count[0] != count[1]:
            raise ValueError(
                f"the trainer is at micro-batch {count[0]} of all ranks, but its checkpoint is at "
                f"{count[1]}: resume with the callback `checkpoint`, or on as many ranks as before"
            )
        return here


def _validates_by_epoch(trainer: Any) -> bool:
    return bool(trainer.check_val_every_n_epoch and trainer.limit_val_batches)


def share_of(batches: int, share: float, per_step: int) -> int:
    """Returns the micro-batches in a fraction of an epoch: whole optimizer steps, at least one."""
    steps = max(1, int(batches // per_step * share + 1e-9))  # in floats, 0.7 * 10 can be below 7
    return steps * per_step
