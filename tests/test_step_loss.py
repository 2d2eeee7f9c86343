"""The loss of a step is a mean over all its terms, however micro-batches and ranks share them."""

import pytest
import torch
from uneven import (
    LABELS,
    LAYOUTS,
    Gradients,
    Samples,
    flat,
    loss_by_hand,
    make_rows,
)

from experiments.run import build, plain
from lightning_modules.video_llm import VideoLLMModule

TERMS = sum(LABELS)


@pytest.fixture(scope="module")
def fit(compose, tiny):
    """`fit(layout, folder, ...)`: the gradients of the steps over the samples, and the module."""

    def run(layout, folder, *words, make=make_rows, stage=VideoLLMModule, val=8, **options):
        words = ["pooler=prompt_guided_2x2", "trainer.gradient_clip_val=null", *words]
        config = compose([*tiny, *words], folder)
        torch.manual_seed(0)
        tuning = build(config.tuning, "tuning")
        module = stage(plain(config.model), list_sgd, tuning=tuning, **options)
        seen = Gradients()
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[seen],
            logger=False,
            enable_checkpointing=False,
            accumulate_grad_batches=layout.accumulation,
        )
        trainer.fit(module, datamodule=Samples(layout, make, val))
        return seen, module

    return run


def list_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.fixture(scope="module")
def network(fit, tmp_path_factory):
    _, module = fit(LAYOUTS["1x8"], tmp_path_factory.mktemp("network"))
    return module.network


def by_hand(network, groups):
    """Gradient of each group of samples: their losses added up one by one, over their number."""
    found = []
    for numbers in groups:
        network.zero_grad()
        total, terms = 0.0, 0
        for number in numbers:
            loss, count = loss_by_hand(network, make_rows([number]))
            loss.backward()
            total, terms = total + loss.item(), terms + count
        gradients = {
            f"model.{name}": p.grad / terms
            for name, p in network.named_parameters()
            if p.grad is not None
        }
        found.append((gradients, total / terms, terms))
    network.zero_grad()
    return found


def groups_of(layout):
    return [[n for numbers in step for n in numbers] for step in layout.steps]


def check(seen, expected):
    assert len(seen.steps) == len(expected)
    for gradients, (truth, loss, _), logged in zip(seen.steps, expected, seen.logged, strict=True):
        assert gradients.keys() == truth.keys()
        difference = (flat(gradients) - flat(truth)).norm() / flat(truth).norm()
        assert difference < 1e-5
        assert logged["train/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("packing", [None, 64], ids=["rows", "packed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_of_a_step_weighs_the_same(name, packing, fit, network, tmp_path):
    seen, _ = fit(LAYOUTS[name], tmp_path, packing=packing)
    check(seen, by_hand(network, groups_of(LAYOUTS[name])))
