"""Preference tuning: makes the answer that people chose more likely than the rejected answer."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datamodules.base import datamodule_of
from datamodules.batch import PreferenceBatch
from datamodules.common.digest import digest_settings
from lightning_modules.model import LogProbs, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.preference.loss import PreferenceLoss
from lightning_modules.training.preference.reference import Reference


class PreferenceModule(VideoLLMModule):
    """Trains with DPO and related losses on pairs of answers about the same visuals.

    Args:
        model, optimizer, scheduler: as in `TrainingModule`.
        training: other arguments of `VideoLLMModule` and `TrainingModule`.
        loss: loss of a pair.
        reference: reference model that the policy must stay close to.
        dpo_alpha: weight of `loss`.
        gamma: weight of the mean negative log-likelihood of the chosen answer's tokens, which keeps
            chosen answers likely (RPO: Pang et al., arXiv 2404.19733).
    """

    in_bar = ("loss", "reward_margin", "reward_accuracy")

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Any,
        scheduler: Any = None,
        *,
        loss: PreferenceLoss,
        reference: Reference,
        dpo_alpha: float = 1.0,
        gamma: float = 0.0,
        **training: Any,
    ):
        super().__init__(model, optimizer, scheduler, **training)
        self.loss, self.reference = loss, reference
        self.dpo_alpha, self.gamma = dpo_alpha, gamma
        self._settings: dict[str, str] = {}

    def configure_model(self) -> None:
        if self.model is None:
            self.reference.prepare(self, self.build_initial)
        super().configure_model()

    def beside(self) -> list[nn.Module]:
        return [] if self.reference.network is None else [self.reference.network]

    def build_initial(self) -> VideoLanguageModel:
        """Returns a new network with the initial weights of the training."""
        network = self.build()
        if self.init is not None:
            self.init.fill(network, self.spec)
        return network

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        values, policy = self._judge(batch)
        sums = {f"pairs/{name}": of_pairs.sum() for name, of_pairs in values.items()}
        total = sums.pop("pairs/loss")
        read = {"tokens": policy.read, "cells": policy.cells}
        return self.add_to_step(total, len(batch), len(batch), **read, **sums)

    def log_step(self, sums: Mapping[str, float]) -> None:
        super().log_step(sums)
        for key, of_pairs in sums.items():
            family, _, name = key.partition("/")
            if family == "pairs":
                mean, seen = of_pairs / sums["samples"], name in self.in_bar
                self.log(f"train/{name}", mean, prog_bar=seen, batch_size=1)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        values, _ = self._judge(batch)
        self.means.update(batch.keys, torch.ones(len(batch), device=self.device), values)

    def _judge(self, batch: PreferenceBatch) -> tuple[dict[str, Tensor], LogProbs]:
        reference = self.reference.log_probs(self.network, batch, self.settings)
        policy = self.network.log_probs(batch)
        return self.judge(policy, reference), policy

    def judge(
        self, policy: LogProbs, reference: Float[Tensor, "b 2"]
    ) -> dict[str, Float[Tensor, " b"]]:
        """Returns loss, rewards and log-probabilities of each pair, by name."""
        counts = policy.counts.clamp(min=1)
        scale = counts if self.loss.per_token else 1
        preference = self.loss(*(policy.sums / scale).unbind(1), *(reference / scale).unbind(1))
        likelihood = -(policy.sums / counts)[:, 0]
        rewards = self.loss.beta * (policy.sums - reference).detach()  # b 2
        chosen, rejected = rewards.unbind(1)
        values = {
            "loss": self.dpo_alpha * preference,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).float(),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "logp_chosen": policy.sums[:, 0],
            "logp_rejected": policy.sums[:, 1],
        }
        if self.gamma:
            values["loss"] = values["loss"] + self.gamma * likelihood
            values["nll_chosen"] = likelihood
        return values

    def settings(self) -> dict[str, str]:
        """Returns digests, by name, of the settings that log-probabilities depend on."""
        if not self._settings:
            self._settings = (
                model_settings(self.network.config) | datamodule_of(self.trainer).settings()
            )
        return self._settings


def model_settings(config: VideoLanguageModelConfig) -> dict[str, str]:
    """Returns digests of the components' specs as in a checkpoint, without their sizes."""
    encoder = {k: v for k, v in (config.encoder or {}).items() if k not in ("config", "source")}
    stages = {"encoder": encoder, "pooler": config.pooler, "rotary": config.rotary}
    stages["positions"] = config.positions
    return {f"model.{stage}": digest_settings(spec) for stage, spec in stages.items()}
