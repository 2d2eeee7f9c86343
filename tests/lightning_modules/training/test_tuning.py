"""Trained parameters: frozen parts, groups with their own learning rates, weight decay."""

from functools import partial

import lightning
import pytest
import torch

from experiments.run.compose import build, plain
from lightning_modules.lora import is_lora, lora_layers
from lightning_modules.training.optim import schedule
from lightning_modules.training.tuning import Tuning
from tests.helpers.tuned import LORA, make_module, train


def test_frozen_parts_have_no_gradient_and_no_optimizer_state():
    parts = ["encoder", "llm.lm.model.embed_tokens", "llm.lm.*norm.weight"]
    module = make_module(Tuning(freeze=parts))
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    trainer = train(module)
    (optimizer,) = trainer.optimizers
    moments = {id(parameter) for parameter in optimizer.state}
    frozen = set()
    for name, parameter in module.network.named_parameters():
        is_frozen = name.startswith(tuple(parts[:2])) or name.endswith("norm.weight")
        assert parameter.requires_grad != is_frozen, name
        assert (id(parameter) in moments) != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name
        assert parameter.grad is None or not is_frozen
        frozen |= {name.partition(".")[0]} if is_frozen else set()
    assert frozen == {"encoder", "llm"}


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (
            {"freeze": ["encoder.txt"]},
            r"tuning\.freeze names 'encoder\.txt', .*: encoder has .*text",
        ),
        ({"freeze": ["lm"]}, r"tuning\.freeze names 'lm', .* it has encoder, pooler, llm"),
        ({"freeze": ["*"]}, r"tuning\.freeze=\['\*'\] leaves nothing to train"),
        ({"groups": {"projektor": {"lr": 1.0}}}, r"tuning\.groups names 'projektor'"),
        (
            {"checkpointing": ["projector"]},
            r"tuning\.checkpointing names projector, .* encoder, llm",
        ),
        ({"compile": ["decoder"]}, r"tuning\.compile names decoder, .* encoder, llm"),
        ({"lora": LORA | {"targets": ["wq"]}}, r"tuning\.lora, targets=\['wq'\] of llm: .*wq"),
        ({"lora": LORA | {"stage": "decoder"}}, r"tuning\.lora\.stage=decoder .* llm, projector"),
        ({"lora": LORA | {"rank": 0}}, r"tuning\.lora, .*positive integer"),
        ({"lora": LORA | {"ranks": 1}}, r"tuning\.lora.*ranks"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(tuning, says):
    module = make_module(Tuning(**tuning))
    with pytest.raises(ValueError, match=says) as caught:
        module.check()
    assert "\n" not in str(caught.value)


def test_a_pattern_may_name_a_part_without_parameters():
    make_module(Tuning(freeze=["pooler"])).check()


def test_groups_get_their_rate_through_the_schedule():
    """The last part that holds a parameter decides. Without a part, the optimizer's value holds."""
    groups = {"encoder": {"lr": 1e-3}, "projector": {"lr": 0.1, "weight_decay": 0.5}}
    groups |= {"encoder.vision.encoder.layers.1": {"lr": 1e-4}}
    seen = []

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(
                {
                    g["name"]: (g["lr"], g["weight_decay"])
                    for g in trainer.optimizers[0].param_groups
                }
            )

    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    scheduler = partial(schedule, name="linear", warmup=0.5)
    module = make_module(Tuning(groups=groups, decay_norms_and_biases=True), optimizer, scheduler)
    trainer = train(module, 4, callbacks=[Rates()])
    names = ["rest", *groups]
    assert [list(step) for step in seen] == [names] * 4
    for step, share in zip(seen, (0, 0.5, 1, 0.5), strict=True):
        rates = [rate for rate, _ in step.values()]
        assert rates == pytest.approx([1e-2 * share, 1e-3 * share, 0.1 * share, 1e-4 * share])
        assert [decay for _, decay in step.values()] == [0, 0, 0.5, 0]
    held = {g["name"]: {id(p) for p in g["params"]} for g in trainer.optimizers[0].param_groups}
    for name, parameter in module.network.named_parameters():
        part = max((p for p in groups if name.startswith(p)), key=len, default="rest")
        assert (id(parameter) in held[part]) == parameter.requires_grad
    total = sum(p.requires_grad for p in module.network.parameters())
    assert sum(map(len, held.values())) == total, "each is in one group alone"


def test_norms_and_biases_are_spared_from_decay_unless_asked():
    def decayed(module):
        optimizer = module.configure_optimizers()
        names = {id(p): name for name, p in module.network.named_parameters()}
        return {
            names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]
        }

    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    every = {n for n, p in make_module().network.named_parameters() if p.requires_grad}
    flat = {n for n in every if n.endswith("bias") or "norm" in n or "class_embedding" in n}
    assert decayed(make_module(Tuning(), adamw)) == every - flat
    assert decayed(make_module(Tuning(decay_norms_and_biases=True), adamw)) == every
    own = Tuning(groups={"projector": {"weight_decay": 0.0}})
    assert decayed(make_module(own, adamw)) == {n for n in every - flat if "projector" not in n}
    (group,) = make_module(Tuning()).configure_optimizers().param_groups
    assert "name" not in group, "where nothing decays nothing is split"


@pytest.mark.parametrize("option", ["full", "frozen_encoder", "projector", "lora"])
def test_every_option_trains_what_it_says(option, compose, tmp_path):
    config = compose([f"tuning={option}"], tmp_path)
    module = build(config.module, "module")(model=plain(config.model))
    trained = {n.split(".")[0] for n, p in module.network.named_parameters() if p.requires_grad}
    expected = {"full": {"encoder", "projector", "llm"}, "projector": {"projector"}}
    assert trained == expected.get(option, {"projector", "llm"})
    if option == "lora":
        llm = [n for n, p in module.network.llm.named_parameters() if p.requires_grad]
        assert all(map(is_lora, llm))
        assert len(lora_layers(module.network)) == 3 * 7
