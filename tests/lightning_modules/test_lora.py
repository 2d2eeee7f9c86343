"""LoRA is part of the model: saved, opened, merged, left out, evaluated with its own alpha."""

import json

import pytest
import torch
import yaml

from experiments import evaluate
from lightning_modules.lora import is_lora, lora_layers, merge_lora, without_lora
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.tuning import Tuning
from tests.helpers.tuned import LORA, hidden, make_module, train, trained_lora


def test_a_fresh_lora_changes_nothing_and_can_be_left_out_later():
    stock = make_module().network
    network = make_module(Tuning(lora=LORA)).network
    missing = network.load_state_dict(stock.state_dict(), strict=False).missing_keys
    assert missing
    assert all(map(is_lora, missing)), "weights saved without LoRA find their place"
    assert torch.equal(hidden(network), hidden(stock))
    network = trained_lora()
    network.load_state_dict(stock.state_dict(), strict=False)
    assert not torch.allclose(hidden(network), hidden(stock), atol=0.1)
    grads = [p.requires_grad for p in network.parameters()]
    with without_lora(network):
        assert torch.equal(hidden(network), hidden(stock))
        assert [p.requires_grad for p in network.parameters()] == grads
    assert not torch.allclose(hidden(network), hidden(stock), atol=0.1)
    with pytest.raises(ValueError, match="no LoRA to leave out"), without_lora(stock):
        pass


def test_lora_saved_and_opened_again_is_the_same(tmp_path):
    network = trained_lora()
    network.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lora"] == LORA
    again, report = VideoLanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(hidden(again), hidden(network))


def test_merged_weights_do_the_same_and_have_their_plain_names(tmp_path):
    network = trained_lora()
    before = hidden(network)
    merged = merge_lora(network)
    assert merged.config.lora is None
    assert merged.state_dict().keys() == make_module().network.state_dict().keys()
    torch.testing.assert_close(hidden(merged), before, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    assert torch.equal(hidden(VideoLanguageModel.from_pretrained(tmp_path)), hidden(merged))


def test_lora_trains_and_nothing_else_of_its_stage_does(tmp_path):
    module = make_module(Tuning(lora=LORA, freeze=["encoder", "llm"]))
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    train(module)
    changed = {n for n, p in module.network.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in changed if not n.startswith("projector")} == set(filter(is_lora, before))


def test_lora_of_another_stage():
    stage = LORA | {"stage": "encoder", "targets": "vision.*(q_proj|fc1)"}
    network = make_module(Tuning(lora=stage)).network
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert any(n.startswith("llm.") for n in trained)
    assert {is_lora(n) for n in trained if n.startswith("encoder.")} == {True}
    assert all(name.startswith("encoder.vision") for name, _ in lora_layers(network))


@pytest.mark.parametrize("changed", [{"alpha": 4}, {"rank": 2}, None])
def test_a_changed_alpha_cannot_slip_in(changed):
    """As in PLLaVA's issue 73: trained with alpha 32, evaluated with 4."""
    module = make_module(Tuning(lora=LORA))
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["stages"]["lora"] == LORA
    make_module(Tuning(lora=dict(LORA))).on_load_checkpoint(checkpoint)
    other = make_module(Tuning(lora=LORA | changed if changed else None))
    with pytest.raises(ValueError, match=r"with lora .*'alpha': 32.*this run has") as caught:
        other.on_load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    plain_run = {"stages": {k: v for k, v in checkpoint["stages"].items() if k != "lora"}}
    with pytest.raises(ValueError, match="trained with lora None, this run has"):
        module.on_load_checkpoint(plain_run)


@pytest.mark.slow
def test_a_lora_run_is_trained_saved_and_evaluated_with_its_own_alpha(run_train, tmp_path):
    """By the program. Later words change nothing in the trained model."""
    words = ["tuning=lora", "tuning.lora.rank=4", "tuning.lora.alpha=32", "data.grid.frames=[4]"]
    run_train(tmp_path, *words, "optim.optimizer.lr=0.05", "test=false")
    typed = {"hydra": {"runtime": {"cwd": str(tmp_path)}}}
    (tmp_path / ".hydra").mkdir(exist_ok=True)
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["tuning.lora.alpha=4"]))
    (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(typed))
    network, _ = evaluate.load(tmp_path)
    assert (network.config.lora["rank"], network.config.lora["alpha"]) == (4, 32)
    assert {layer.scaling["default"] for _, layer in lora_layers(network)} == {8.0}
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    frozen = {n for n, p in network.named_parameters() if n.startswith("llm") and not is_lora(n)}
    optimizer = checkpoint["optimizer_states"][0]
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert held == len(optimizer["state"])
    assert held == len(list(filter(is_lora, checkpoint["state_dict"]))) + 4
    assert frozen
    config = VideoLanguageModelConfig(**checkpoint["stages"])
    torch.manual_seed(1)
    rebuilt = VideoLanguageModel(config)
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    rebuilt.load_state_dict(weights)
    embeds = torch.randn(1, 5, network.llm.width)
    positions = network.rotary.batch_positions([[5]])
    with torch.no_grad():
        assert torch.equal(
            rebuilt.eval().llm(embeds, None, positions), network.llm(embeds, None, positions)
        )
    assert any(weights[n].any() for n in weights if "lora_B" in n), "it has learnt something"
