"""Sources of the reference log-probabilities: shards, a frozen copy, or the model without LoRA."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datamodules.batch import PreferenceBatch
from lightning_modules.lora import is_lora, without_lora
from lightning_modules.model import VideoLanguageModel
from lightning_modules.training.base import TrainingModule

Settings = Callable[[], Mapping[str, str]]


class Reference(ABC):
    """The reference that the policy must stay close to.

    It is not a `nn.Module`, so that nothing of it is trained or saved.

    Attributes:
        network: the reference's own model, if it has one; set by `prepare`.
    """

    network: VideoLanguageModel | None = None

    def prepare(self, stage: TrainingModule[Any], build: Callable[[], VideoLanguageModel]) -> None:
        """Prepares the reference before the policy is built; `build` returns an initial model."""
        return

    @abstractmethod
    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """Returns log-probabilities summed over the tokens of each answer, in float32.

        The columns are the chosen and the rejected answers. `settings` returns digests, by name, of
        the settings that they depend on besides the weights.
        """


class StreamedReference(Reference):
    """Reads log-probabilities that `ropelab-reference` has written into the shards."""

    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """Returns the log-probabilities that were read with the batch.

        Raises:
            ValueError: there are none, or they were made with different settings.
        """
        if policy.rotary.draws:
            raise ValueError(
                f"{type(policy.rotary).__name__} draws its settings anew in each epoch, and the "
                "reference log-probabilities in the shards have fixed ones: set "
                "module/reference=frozen"
            )
        if batch.reference is None:
            raise ValueError(
                f"no reference log-probabilities in the shards, near {batch.keys[0]}: write them "
                "there with ropelab-reference, or set module/reference=frozen"
            )
        for written in batch.settings:
            for name, digest in settings().items():
                if written.get(name) != digest:
                    raise ValueError(
                        "the reference log-probabilities in the shards were made with another "
                        f"{name} ({written.get(name)}, but here {digest}): write them again with "
                        f"ropelab-reference, or go back to that {name}"
                    )
        return batch.reference


class FrozenReference(Reference):
    """Uses a second model with the initial weights of the training, even after a resume.

    It is built and sharded like the policy. Without stored weights, it is initialised from the same
    random numbers.
    """

    def prepare(self, stage: TrainingModule[Any], build: Callable[[], VideoLanguageModel]) -> None:
        with torch.random.fork_rng():  # the policy is built from the same state
            network = build()
        network.requires_grad_(False).eval()
        stage.precision.convert_module(network)  # as Lightning does with the policy
        stage.shard(network)
        self.network = network

    @torch.no_grad()
    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        assert self.network is not None
        return self.network.log_probs(batch).sums


class BaseReference(Reference):
    """Uses the policy without its LoRA; no other weights may be trained."""

    @torch.no_grad()
    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """Returns the log-probabilities of the policy without LoRA.

        Raises:
            ValueError: there is no LoRA, or other weights are trained.
        """
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        others = [name for name in trained if not is_lora(name)]
        if others or not trained:
            found = f"also trains {others[0]}" if others else "has none"
            raise ValueError(
                "module/reference=base compares the policy with itself without LoRA, but this run "
                f"{found}: set tuning=lora and freeze the rest with tuning.freeze, or set "
                "module/reference=frozen"
            )
        with without_lora(policy), _evaluating(policy):
            return policy.log_probs(batch).sums


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Sets `network` to eval mode inside the context, and restores each module's mode after it."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
