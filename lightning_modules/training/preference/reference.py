"""Where the reference's log-probabilities come from: shards, a frozen copy, or the model itself."""

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
    """What the policy is held close to. It is no module: nothing of it is trained or saved.

    Attributes:
        network: a model of its own, where it has one and `prepare` has been called.
    """

    network: VideoLanguageModel | None = None

    def prepare(self, stage: TrainingModule[Any], build: Callable[[], VideoLanguageModel]) -> None:
        """Called before the policy is built; `build` makes a model as training begins with it."""
        return

    @abstractmethod
    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """Summed over the tokens of the chosen and of the rejected answers, in float32.

        `settings` are digests by name of what they depend on beside the weights.
        """


class StreamedReference(Reference):
    """They stand in the shards, where `ropelab-reference` has written them."""

    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """As they were read.

        Raises:
            ValueError: there are none, or they were made with other settings than those here.
        """
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
                        f"{name} ({written.get(name)}, here {digest}): write them again with "
                        f"ropelab-reference, or go back to that {name}"
                    )
        return batch.reference


class FrozenReference(Reference):
    """A second model with the weights that the training starts from, also after an interruption.

    It is built as the policy is, from the same random numbers where there are no weights to read,
    and sharded as the policy is.
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
    """The policy without its LoRA; nothing else of it may be trained."""

    @torch.no_grad()
    def log_probs(
        self, policy: VideoLanguageModel, batch: PreferenceBatch, settings: Settings
    ) -> Float[Tensor, "b 2"]:
        """
        Raises:
            ValueError: there is no LoRA, or other weights are trained.
        """
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        others = [name for name in trained if not is_lora(name)]
        if others or not trained:
            found = f"trains {others[0]} beside it" if others else "has none"
            raise ValueError(
                "module/reference=base holds the policy to itself without LoRA, but this run "
                f"{found}: set tuning=lora and freeze the rest with tuning.freeze, or set "
                "module/reference=frozen"
            )
        with without_lora(policy), _evaluating(policy):
            return policy.log_probs(batch).sums


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode that it was in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
