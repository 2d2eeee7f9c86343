"""Preference tuning: its references, and runs that are stopped, shared by ranks and evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer

from experiments import evaluate
from experiments.run.compose import build, plain, share_steps
from lightning_modules.callbacks.randomness import SeedByPosition
from lightning_modules.training.preference.module import PreferenceModule
from tests.helpers.pairs import (
    OPTIONS,
    TINY,
    read_pairs,
    run,
    saved,
    stage_maker,
    val_metrics,
    words_of,
    write_pairs,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return words_of(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def make_stage(words, compose, tmp_path_factory):
    return stage_maker(words, compose, tmp_path_factory)


@pytest.mark.parametrize("group", OPTIONS)
def test_every_option_is_made(group, make_stage):
    for name in OPTIONS[group]:
        module, _ = make_stage(f"module/{group}={name}")
        assert name in type(getattr(module, group)).__name__.lower()


def test_the_base_is_no_reference_without_lora(make_stage):
    module, data = make_stage("module/reference=base")
    batch = data.collater()(read_pairs(data, 2))
    with pytest.raises(ValueError, match=r"this run also trains \S+: set tuning=lora"):
        module.reference.log_probs(module.network, batch, dict)
    module.network.requires_grad_(False)
    with pytest.raises(ValueError, match="this run has none: set tuning=lora"):
        module.reference.log_probs(module.network, batch, dict)


def test_the_base_under_lora_is_the_model_before_lora(make_stage):
    lora = pytest.importorskip("lightning_modules.lora")
    module, data = make_stage("module/reference=base", "+model.llm.config.attention_dropout=0.5")
    batch = data.collater()(read_pairs(data, 2))
    network = module.network.requires_grad_(False)
    before = network.eval().log_probs(batch).sums
    lora.add_lora(network, targets=["q_proj", "v_proj"], rank=2, alpha=8)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network.train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    reference = module.reference.log_probs(network, batch, dict)
    torch.testing.assert_close(reference, before, rtol=0, atol=0)
    assert all(part.training for part in network.modules())
    assert (network.log_probs(batch).sums - before).abs().min() > 0.1


class Watch(Callback):
    """Records the losses by step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.losses):
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def test_a_frozen_reference_is_what_training_started_from(make_stage):
    module, data = make_stage()
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    start = {name: p.clone() for name, p in module.network.named_parameters()}
    trainer.fit(module, datamodule=data)
    assert watch.losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    kept = module.reference.network
    assert all(torch.equal(p, start[name]) for name, p in kept.named_parameters())
    assert any(not torch.equal(p, start[name]) for name, p in module.network.named_parameters())
    assert not any(p.requires_grad for p in kept.parameters())
    own = {id(p) for p in kept.parameters()}
    assert not own & {id(p) for p in module.parameters()}
    assert len(module.state_dict()) == len(module.network.state_dict())


@pytest.fixture(scope="module")
def whole(words, compose, tmp_path_factory):
    """A run of 4 steps against a frozen copy."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, words, compose)
    return folder


def test_a_run_that_stops_goes_on_against_the_same_reference(
    whole, words, compose, make_stage, tmp_path, monkeypatch
):
    step = PreferenceModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("stopped")
        return step(self, batch, batch_idx)

    often = [*words, "callbacks.checkpoint.every_n_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModule, "training_step", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path, often, compose)
    done = run(tmp_path, often, compose)
    expected = json.loads((whole / "done.json").read_text())
    assert done["steps"] == 4
    assert done["weights_sha256"] == expected["weights_sha256"]
    assert done["metrics"] == expected["metrics"]
    module, _ = make_stage()
    assert saved(tmp_path).keys() == {f"model.{k}" for k in module.network.state_dict()}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_validation_does_not_depend_on_the_batch_size(
    batch_size, words, compose, make_stage, tmp_path
):
    """There are 5 pairs, so the last batch of two is not full."""
    trainer_words = [f"data.batch_size={batch_size}", "data.global_batch_size=4"]
    run(tmp_path, [*words, *trainer_words, "optim.optimizer.lr=0.0"], compose)
    (values,) = val_metrics(tmp_path)
    assert values["val/reward_margin"] == pytest.approx(0, abs=1e-5)
    module, data = make_stage()
    pairs = read_pairs(data, 5, "val")
    with torch.no_grad():
        policy = module.network.eval().log_probs(data.collater()(pairs))
    assert values["val/logp_chosen"] == pytest.approx(policy.sums[:, 0].mean().item(), rel=1e-5)
    assert values["val/logp_rejected"] == pytest.approx(policy.sums[:, 1].mean().item(), rel=1e-5)


# Many processes, and one that is killed

#: The eps is large because AdamW would turn rounding errors of zero gradients into full steps.
LONG = [
    "optim.optimizer.lr=2.0e-3",
    "+optim.optimizer.eps=3.0e-2",
    "data.batch_size=1",
    "trainer.max_epochs=5",
]


@pytest.fixture(scope="module")
def fit(words, compose, tmp_path_factory):
    """`fit(*overrides)` returns the losses by step, and the weights, of 20 steps."""

    def run(*more):
        config = compose([*words, *LONG, *more], tmp_path_factory.mktemp("fit"))
        module = build(config.module, "module")(model=plain(config.model))
        data, watch = build(config.data, "data"), Watch()
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[watch, SeedByPosition(0)],
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        share_steps(trainer, data)
        trainer.fit(module, datamodule=data)
        return watch.losses, whole_weights(module.network)

    return run


def whole_weights(network):
    with torch.no_grad():
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
            for name, p in network.named_parameters()
        }


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim", "fsdp_tp_sim"])
def test_two_ranks_learn_what_one_process_learns(trainer, fit, run_ranks):
    losses, weights = fit()
    results = run_ranks(2, lambda rank: fit(f"trainer={trainer}", "trainer.devices=2"))
    assert len(losses) == 20
    assert sum(losses[:2]) > 1.1 * sum(losses[-2:])
    for seen, after in results:
        torch.testing.assert_close(seen, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_kill_9(whole, words, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *words]
    command += ["callbacks.checkpoint.every_n_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    root = Path(__file__).parents[3]
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True) as process:
        end = time.monotonic() + 200
        while not last.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "done.json").exists()
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    first, second = (json.loads((f / "done.json").read_text()) for f in (whole, tmp_path / "run"))
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["metrics"] == first["metrics"]


def evaluated(run, folder, monkeypatch, *words):
    """Returns done.json of ropelab-evaluate on a run."""
    monkeypatch.chdir(folder)
    argv = ["ropelab-evaluate", f"run={run}", *words, f"hydra.run.dir={folder / 'out'}"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    return json.loads((folder / "out" / "done.json").read_text())


@pytest.mark.slow
def test_a_run_is_evaluated_on_needles(whole, needle_shards, tmp_path, monkeypatch):
    words = ["data=vniah", "eval=vniah_d_tiny", f"paths.data={needle_shards}"]
    grid = ["data.grid.frames=[4]", "data.grid.needles=2", "data.grid.depths=[0.0]"]
    period = "data.grid.conditions.periodic.period=2"
    done = evaluated(whole, tmp_path, monkeypatch, *words, *grid, period)
    assert done["steps"] == 4
    assert 0 <= done["metrics"]["score"] <= 1
    assert (tmp_path / "out" / "needle.json").is_file()


@pytest.mark.slow
def test_pairs_have_no_score_and_a_line_says_what_has(whole, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"pairs of answers.*data=vniah .*data=instruct") as caught:
        evaluated(whole, tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_tiny_recipe_learns_what_is_seen(compose, tmp_path):
    """It prefers the right colour in clips that it has not seen, and only because it sees them."""
    quiet = [word for word in TINY if word.startswith(("callbacks", "+", "print", "logger"))]
    words = ["experiment=ppllava_dpo", "scale=tiny", *quiet]
    run(tmp_path, words, compose)
    last = val_metrics(tmp_path)[-1]
    assert last["val/reward_accuracy"] > 0.9
    assert last["val/reward_margin"] > 0.3
    config = compose(words, tmp_path)
    module = build(config.module, "module")(model=plain(config.model))
    data = build(config.data, "data")
    torch.manual_seed(0)
    start = module.build_initial().eval()
    module.network.load_state_dict(
        {k.removeprefix("model."): v for k, v in saved(tmp_path).items()}
    )
    batch = data.collater()(read_pairs(data, 64, "val"))
    batch.chosen.frames[:] = 0
    with torch.no_grad():
        margins = [network.log_probs(batch).sums for network in (module.network.eval(), start)]
    chosen, rejected = (margins[0] - margins[1]).unbind(1)
    assert (chosen > rejected).float().mean() < 0.75
