"""Training of CLIP's text context by the programs: trained, killed, resumed, evaluated."""

import json
import sys
from pathlib import Path

import pytest
import torch

from experiments import evaluate, train
from experiments.run.compose import plain
from experiments.run.files import read_curves
from lightning_modules.checkpoint.weights import read_checkpoint
from lightning_modules.training.contrast import ClipContextModule
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.tiny_clip import SMALL

QUIET = [
    "logger=csv",
    "print_config=false",
    "callbacks.progress=null",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
]
RUN = [
    *SMALL,
    *QUIET,
    "prepare.counts={train: [16], val: [6]}",
    "data.global_batch_size=4",
    "data.batch_size=4",
    "data.stream.num_workers=0",
    "trainer.max_epochs=2",
    "callbacks.checkpoint.every_n_steps=2",
]


def run_train(compose, folder, *overrides):
    train.main.__wrapped__(compose([*RUN, *overrides], folder))


@pytest.fixture(scope="module")
def done(compose, tmp_path_factory) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("done")
    run_train(compose, folder)
    return folder


def test_micro_batches_that_would_not_see_each_other_are_refused(compose, tmp_path):
    line = r"size=8 with data\.batch_size=4 on 1 ranks makes 2 micro-batches .*=8, or .*_size=4$"
    with pytest.raises(SystemExit, match=line):
        run_train(compose, tmp_path, "data.global_batch_size=8")


def test_a_run_leaves_its_recall_and_an_encoder_that_others_start_from(done):
    result = json.loads((done / "done.json").read_text())
    assert result["steps"] == 8
    assert {f"val/{way}_r{rank}" for way in ("t2i", "i2t") for rank in (1, 5, 10)} | {
        "train/loss",
        "val/loss",
    } == result["metrics"].keys()
    assert not (done / "generations.jsonl").exists()
    assert "train/tokens_per_s" in read_curves(done / "metrics.csv")
    checkpoint = read_checkpoint(done / "checkpoints" / "last.ckpt")
    assert checkpoint["stages"].keys() == {"encoder"}
    assert checkpoint["stages"]["encoder"]["context_length"] == 248
    names = checkpoint["state_dict"].keys()
    assert {name.split(".")[1] for name in names} == {"encoder", "logit_scale"}
    assert (done / "checkpoints" / "best.ckpt").exists()


def test_a_killed_run_goes_on_to_the_same_weights(done, compose, tmp_path, monkeypatch):
    step = ClipContextModule.training_step

    def die(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClipContextModule, "training_step", die)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(compose, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4
    run_train(compose, tmp_path)
    cut, undisturbed = (json.loads((f / "done.json").read_text()) for f in (tmp_path, done))
    assert cut["weights_sha256"] == undisturbed["weights_sha256"]
    assert cut["metrics"] == undisturbed["metrics"]


def test_a_checkpoint_of_another_stage_of_training_is_refused(done, compose, tmp_path, tiny):
    of_clip = {"stages": {"encoder": {}}}
    of_llm = {"stages": {"encoder": {}, "pooler": {}, "rotary": {}, "llm": {}}}
    tuning = VideoLLMModule(plain(compose(tiny, tmp_path).model), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^the checkpoint holds encoder alone"):
        tuning.on_load_checkpoint(of_clip)
    context = ClipContextModule(plain(compose(RUN, tmp_path).model), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^the checkpoint holds encoder, llm, .*, but"):
        context.on_load_checkpoint(of_llm)
    context.on_load_checkpoint(of_clip)


def test_evaluation_finds_the_recall_of_the_training_again(done, tmp_path, monkeypatch):
    """From any folder, on the shards that the recipe has made in the run directory."""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-evaluate", f"run={done}", f"hydra.run.dir={out}"])
    evaluate.main()
    trained, again = (json.loads((f / "done.json").read_text()) for f in (done, out))
    found = {n: v for n, v in trained["metrics"].items() if n.startswith("val/")}
    assert again["metrics"] == pytest.approx(found | {"score": found["val/t2i_r1"]})
    assert again["steps"] == trained["steps"] == 8


def test_an_encoder_alone_is_no_model_of_language(done):
    with pytest.raises(ValueError, match=r"holds encoder alone, .* init=.* its recall") as caught:
        evaluate.load(done)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_scale_stays_within_100(compose, tmp_path):
    run_train(compose, tmp_path, "module.temperature=0.001", "trainer.max_epochs=1")
    weights = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert 90 < weights["model.logit_scale"].exp().item() < 100.001


@pytest.mark.slow
@pytest.mark.parametrize(("context", "finds"), [(248, True), ("null", False)])
def test_the_tiny_recipe_finds_what_stands_behind_clips_own_context(
    context, finds, compose, tmp_path
):
    words = ["experiment=clip_context", "scale=tiny", *QUIET]
    words += [f"model.encoder.context_length={context}"]
    train.main.__wrapped__(compose(words, tmp_path))
    recall = json.loads((tmp_path / "done.json").read_text())["metrics"]["val/t2i_r1"]
    assert (recall > 0.15) if finds else (recall < 0.03)  # among 200: 0.005 by chance
