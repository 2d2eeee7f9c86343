"""`init`: a new training starts from saved weights, and a resumed one from its own."""

import json
import logging
import shutil
from functools import cache
from itertools import count

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.device_mesh import init_device_mesh

from experiments.run.compose import plain
from lightning_modules.checkpoint.weights import read_checkpoint
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.initial import Initial
from lightning_modules.training.instruct import VideoLLMModule


@pytest.fixture(scope="module")
def spec(compose, tiny, tmp_path_factory):
    """`spec(*overrides)` returns the components of a tiny run."""
    folder = tmp_path_factory.mktemp("spec")
    return cache(lambda *overrides: plain(compose([*tiny, *overrides], folder).model))


@pytest.fixture(scope="module")
def trained(spec, tmp_path_factory):
    """Writes a run directory with a checkpoint."""
    torch.manual_seed(3)
    module = VideoLLMModule(spec(), torch.optim.AdamW)
    checkpoint = {"state_dict": {f"model.{n}": v for n, v in module.network.state_dict().items()}}
    module.on_save_checkpoint(checkpoint)
    folder = tmp_path_factory.mktemp("trained")
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def weights(trained):
    held = read_checkpoint(trained / "checkpoints" / "last.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in held.items()}


@pytest.fixture(scope="module")
def make_module(spec):
    """`make_module(init, *overrides, **allow)` returns ropelab-train's module, not built."""

    def make(init, *overrides, seed=5, **allow):
        torch.manual_seed(seed)
        stages = spec(*overrides)
        return VideoLLMModule(stages, torch.optim.AdamW, init=str(init), init_allow=allow)

    return make


def assert_same(network, weights):
    torch.testing.assert_close(dict(network.state_dict()), weights, atol=0, rtol=0)


@pytest.fixture(scope="module")
def saved(weights, trained, tmp_path_factory):
    """The weights equal those that `save_pretrained` writes."""
    stages = read_checkpoint(trained / "checkpoints" / "last.ckpt")["stages"]
    model = VideoLanguageModel(VideoLanguageModelConfig(**stages))
    model.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.mark.parametrize("kind", ["run", "checkpoint", "best", "folder"])
def test_it_starts_from_a_run_a_checkpoint_or_a_folder(
    kind, trained, saved, weights, make_module, tmp_path
):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    best = tmp_path / "best.ckpt"
    shutil.copy(checkpoint, best)
    init = {"run": trained, "checkpoint": checkpoint, "best": best, "folder": saved}[kind]
    module = make_module(init)
    module.check()
    fresh = make_module(init).build().projector.linear_1.weight
    assert not torch.equal(fresh, weights["projector.linear_1.weight"])
    assert_same(module.network, weights)


def test_of_a_run_the_newest_whole_checkpoint_counts(trained, weights, make_module, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "checkpoints", run / "checkpoints")
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "previous.ckpt")
    (run / "checkpoints" / "last.ckpt").write_bytes(b"cut")
    assert_same(make_module(run).network, weights)


def test_both_sides_are_strict_and_say_what_would_allow_it(weights, make_module, tmp_path):
    """As after a stage that trained only the encoder, with one more layer."""
    kept = {f"model.{n}": v for n, v in weights.items() if n.startswith("encoder.")}
    kept["model.encoder.vision.encoder.layers.9.mlp.fc1.bias"] = torch.ones(4)
    path = tmp_path / "clip.ckpt"
    torch.save({"state_dict": kept, "stages": {}}, path)
    for act in (VideoLLMModule.check, VideoLLMModule.configure_model):
        with pytest.raises(ValueError, match="does not fit") as caught:
            act(make_module(path))
        line = str(caught.value)
        others = len([n for n in weights if not n.startswith("encoder.")])
        assert "\n" not in line
        assert "1 of its keys have no place in the model (encoder.vision.encoder.layers.9" in line
        assert f"{others} parameters of the model are not in it" in line
        assert "init_allow.unused" in line
        assert "init_allow.unfilled" in line
    with pytest.raises(ValueError, match=r"init_allow\.unfilled") as caught:
        make_module(path, unused=["encoder.vision.encoder.layers.9.*"]).network  # noqa: B018
    assert "init_allow.unused" not in str(caught.value)

    allow = {
        "unused": ["encoder.vision.encoder.layers.9.*"],
        "unfilled": ["pooler.*", "projector.*", "llm.*"],
    }
    filled = make_module(path, **allow).network.state_dict()
    for name, value in make_module(path).build().state_dict().items():
        expected = weights[name] if name.startswith("encoder.") else value
        assert torch.equal(filled[name], expected), name


def test_another_rotary_scheme_is_meant_and_noted(trained, weights, make_module, caplog):
    with caplog.at_level(logging.INFO):
        assert_same(make_module(trained, "rotary=mrope").network, weights)
    (line,) = [r.getMessage() for r in caplog.records if "rotary" in r.getMessage()]
    assert "VideoRope" in line
    assert "MRope" in line
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_module(trained).network  # noqa: B018
    assert not [r for r in caplog.records if "rotary" in r.getMessage()]


def test_lora_beside_the_weights_starts_fresh(trained, weights):
    stages = read_checkpoint(trained / "checkpoints" / "last.ckpt")["stages"]
    model = VideoLanguageModel(VideoLanguageModelConfig(**stages))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model.llm.lm)
    Initial(str(trained)).fill(model, {})
    state = model.state_dict()
    assert any(".base_layer." in name for name in state)
    for name, value in weights.items():
        ours = name if name in state else name.replace("q_proj.", "q_proj.base_layer.")
        assert torch.equal(state[ours], value), ours


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "nowhere does not exist"),
        (lambda p: (p / "checkpoints").mkdir() or p, "no checkpoint in .*init= to a run directory"),
        (
            lambda p: (p / "a.ckpt").write_bytes(b"x") and p / "a.ckpt",
            "is truncated or not a checkpoint",
        ),
        (
            lambda p: (p / "config.json").write_text(json.dumps({"model_type": "qwen2"})) and p,
            "ropelab-import",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_built(make, says, make_module, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        make_module(make(tmp_path)).check()
    assert "\n" not in str(caught.value)


def test_another_size_is_named_by_both_shapes(trained, make_module):
    with pytest.raises(ValueError, match=r"is \(64, 64\), .* is \(64, 32\)|\(\d+,.* is \(\d+,"):
        make_module(trained, "model.llm.config.hidden_size=32").check()


def die_at_the_fourth():
    step, numbers = VideoLLMModule.training_step, count(1)

    def counting(self, batch, batch_idx):
        if next(numbers) == 4:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    return counting


@pytest.mark.slow
def test_a_run_that_goes_on_has_its_own_weights(run_train, trained, weights, tmp_path, monkeypatch):
    """Killed and restarted without the weights of `init`: equal to an undisturbed run."""
    source = tmp_path / "source"
    shutil.copytree(trained / "checkpoints", source / "checkpoints")
    steps = ["data.training.samples=16", "callbacks.checkpoint.every_n_steps=2"]  # four of them
    words = [*steps, "test=false", f"init={source}"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_train(whole, *words)
    with monkeypatch.context() as patch:
        patch.setattr(VideoLLMModule, "training_step", die_at_the_fourth())
        with pytest.raises(RuntimeError, match="killed"):
            run_train(halves, *words)
    shutil.rmtree(source)
    run_train(halves, *words)
    ends = [
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in (whole, halves)
    ]
    torch.testing.assert_close(ends[1], ends[0], atol=0, rtol=0)
    name = "projector.linear_1.weight"
    moved = (ends[0][f"model.{name}"] - weights[name]).abs()
    assert 0 < moved.max() < 0.02, "four steps of 0.001 move no further; a new start would"
    assert weights[name].abs().max() > 0.1


@pytest.mark.parametrize("source", ["file", "folder"])
def test_two_sharded_ranks_hold_the_same_weights_in_pieces(
    source, trained, saved, weights, make_module, run_ranks
):
    def run(rank):
        torch.distributed.init_process_group("gloo")
        module = make_module(trained if source == "file" else saved, seed=rank)
        axes = ("data_parallel", "tensor_parallel")
        module._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=axes)
        module.configure_model()
        state = module.network.state_dict()
        local = sum(p.to_local().numel() for p in module.network.parameters())
        whole = {name: value.full_tensor() for name, value in state.items()}
        torch.distributed.destroy_process_group()
        return local, whole

    results = run_ranks(2, run)
    for local, whole in results:
        assert local < 0.6 * sum(p.numel() for p in weights.values())
        torch.testing.assert_close(whole, weights, atol=0, rtol=0)


@pytest.mark.slow
def test_the_shards_of_two_ranks_are_started_from_by_one(
    run_train, make_module, run_ranks, tmp_path
):
    words = ["trainer=fsdp_sim", "data.batch_size=2", "data.training.samples=8", "test=false"]
    run_ranks(2, lambda rank: run_train(tmp_path, *words))
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert path.is_dir()
    held = read_checkpoint(path)["state_dict"]
    for init in (tmp_path, path):
        state = make_module(init).network.state_dict()
        assert {f"model.{name}" for name in state} >= set(held)
        for name, value in held.items():
            assert torch.equal(state[name.removeprefix("model.")], value), name
