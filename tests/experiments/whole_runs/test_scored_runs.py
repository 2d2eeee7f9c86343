"""Whole runs that score held-out questions: their files, any number of ranks, and again later."""

import json
import shutil
import sys

import pytest
import torch

from datamodules.stream.index import read_manifest
from experiments import evaluate, train
from experiments.run.compose import build, plain
from experiments.run.files import read_curves
from lightning_modules.callbacks.score_book import ScoreBook
from lightning_modules.checkpoint.weights import read_checkpoint
from lightning_modules.training.instruct import VideoLLMModule

#: experiment=resume_probe on questions, which the recipe's `prepare` makes.
PROBE = [
    "experiment=resume_probe",
    "prepare.counts={train: [24], val: [6, 5]}",
    "+prepare.make={_target_: tests.helpers.questions.make_question, _partial_: true}",
    "prepare.num_frames=4",
    "data.stream={virtual_streams: 2, window: 4, num_workers: 0}",
    "trainer.max_epochs=1",
    "trainer.val_check_interval=1.0",
    "trainer.limit_train_batches=8",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "callbacks.progress=null",
    "print_config=false",
    "logger=csv",
]
NAMES = {"perplexity", "mc_likelihood", "mc_generated", "mc_unparsed", "open_exact", "open_f1"} | {
    f"pair_{kind}"
    for kind in ("basic", "hallucinated", "overall", "yes_bias", "false_yes", "unparsed")
}


@pytest.fixture(scope="module")
def run(compose):
    def make(folder, *overrides):
        return train.main.__wrapped__(compose([*PROBE, *overrides], folder))

    return make


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """A run that validated twice and kept the weights with the highest perplexity."""
    folder = tmp_path_factory.mktemp("scored")
    best = ["callbacks.best.monitor=val/perplexity", "callbacks.best.mode=max"]
    run(folder, "trainer.val_check_interval=0.5", *best)
    return folder


def read_scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_every_score_is_kept_with_what_it_depends_on(scored):
    first, validation = read_scores(scored)
    assert (first["step"], validation["step"]) == (1, 2)
    rows = {row["name"]: row for row in validation["scores"]}
    assert rows.keys() == NAMES
    counts = {name: row["count"] for name, row in rows.items()}
    assert (counts["perplexity"], counts["mc_generated"], counts["pair_unparsed"]) == (11, 3, 6)
    assert (counts["pair_overall"], counts["open_f1"]) == (3, 2)
    assert rows["mc_generated"]["parser"].startswith("parse_letter ")
    assert rows["mc_generated"]["max_new_tokens"] == 16
    assert rows["mc_likelihood"]["parser"] is None
    assert validation["frames"]["sampler"] == {"name": "UniformSampler", "num_frames": 4}
    assert validation["frames"]["image_size"] == 32
    assert validation["samples"] == 11
    assert validation["data"] == read_manifest(str(scored / "shards" / "val")).fingerprint()
    assert len(validation["chat_template"]) == 16
    assert validation["prompt"] == (
        "<|user|><visual>\nWhat color is shown?\nA. red\nB. green\nC. blue\nD. yellow\n"
        "Answer with the letter.<|assistant|>"
    )
    assert validation["generation"]["do_sample"] is False
    assert {"ropelab", "torch", "transformers"} <= validation["versions"].keys()
    assert validation["run"]


def test_scores_are_among_the_metrics_of_a_run(scored):
    curves = read_curves(scored / "metrics.csv")
    metrics = json.loads((scored / "done.json").read_text())["metrics"]
    for row in read_scores(scored)[1]["scores"]:
        assert metrics[f"val/{row['name']}"] == pytest.approx(row["value"], rel=1e-5)
        assert len(curves[f"val/{row['name']}"]) == 2


def test_the_best_checkpoint_is_kept_by_a_score(scored):
    perplexity = {
        validation["step"]: row["value"]
        for validation in read_scores(scored)
        for row in validation["scores"]
        if row["name"] == "perplexity"
    }
    best = read_checkpoint(scored / "checkpoints" / "best.ckpt")["global_step"]
    assert best == max(perplexity, key=perplexity.__getitem__) == 1, "training made it fall"


def test_steps_that_are_taken_again_replace_their_scores(tmp_path):
    book = ScoreBook(tmp_path, "run")
    for step, value in ((2, "a"), (4, "b"), (6, "c"), (4, "d"), (8, "e")):
        book.write({"step": step, "value": value})
    assert [v["value"] for v in read_scores(tmp_path)] == ["a", "d", "e"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_scores(run, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole", tmp_path / "again"
    words = ["trainer.max_epochs=2", "scores=perplexity", "callbacks.checkpoint.every_n_steps=1"]
    run(whole, *words)
    step = VideoLLMModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise ValueError("as if the machine had failed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(VideoLLMModule, "training_step", interrupted)
        with pytest.raises(SystemExit, match="machine"):
            run(again, *words)
    assert [validation["step"] for validation in read_scores(again)] == [2]
    run(again, *words)
    assert read_scores(again) == read_scores(whole)
    assert [validation["step"] for validation in read_scores(again)] == [2, 4]


def test_a_trained_model_is_scored_on_other_shards(scored, tmp_path, monkeypatch):
    """In a place without the shards of the training."""
    out = tmp_path / "out"
    shards = shutil.copytree(scored / "shards" / "val", tmp_path / "held-out")
    words = [f"run={scored}", f"data.val={shards}", f"hydra.run.dir={out}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-evaluate", *words])
    evaluate.main()
    (again,), before = read_scores(out), read_scores(scored)[1]
    assert again["scores"] == [
        {**row, "value": pytest.approx(row["value"], rel=1e-5)} for row in before["scores"]
    ]
    assert (again["step"], again["data"], again["prompt"]) == (2, before["data"], before["prompt"])
    trained = json.loads((scored / "done.json").read_text())
    assert again["weights"] == {"from": str(scored), "sha256": trained["weights_sha256"]}
    metrics = json.loads((out / "done.json").read_text())["metrics"]
    assert metrics.keys() == {f"val/{name}" for name in NAMES} | {"val/loss"}


@pytest.mark.parametrize("trainer", ["ddp_sim", pytest.param("fsdp_sim", marks=pytest.mark.slow)])
def test_two_ranks_score_what_one_scores(trainer, compose, run_ranks, scored, tmp_path):
    """11 samples in batches of 4: the ranks take two batches each, and so repeat the first one."""

    def validate(world, *overrides):
        shards = f"data.val={scored / 'shards' / 'val'}"
        words = [*PROBE, shards, "data.train=null", "data.batch_size=4", *overrides]
        config = compose([*words, "model.llm.config.initializer_range=0.3"], tmp_path)
        torch.manual_seed(3)
        module = VideoLLMModule(plain(config.model), list, scores=build(config.scores, "scores"))
        assert module.network.encoder is not None  # built here, with this seed
        engine = build(config.trainer, "trainer", logger=False, enable_checkpointing=False)
        data = build(config.data, "data")
        engine.validate(module, datamodule=data, verbose=False)
        logged = {name: float(value) for name, value in engine.callback_metrics.items()}
        return module.scored, logged

    alone, _ = validate(1)
    assert alone.keys() == NAMES
    overrides = [f"trainer={trainer}", "trainer.devices=2"]
    for found, logged in run_ranks(2, lambda rank: validate(2, *overrides)):
        assert found.keys() == NAMES
        for name, facts in alone.items():
            assert found[name]["count"] == facts["count"], name
            exact = facts["value"] if name != "perplexity" else pytest.approx(facts["value"])
            assert found[name]["value"] == exact, name
            assert logged[f"val/{name}"] == pytest.approx(facts["value"]), name


@pytest.mark.slow
def test_training_raises_multiple_choice_above_chance(run, tmp_path):
    """Clips of a colour. The tiny model learns to name the letter of the colour."""
    words = [
        "scores=mc",
        "prepare.counts={train: [800], val: [80]}",
        "trainer.max_epochs=2",
        "trainer.val_check_interval=0.25",
        "trainer.limit_train_batches=1.0",
        "model.llm.config.attention_dropout=0.0",
        "data.batch_size=8",
    ]
    run(tmp_path, *words)
    curves = read_curves(tmp_path / "metrics.csv")
    for name in ("val/mc_likelihood", "val/mc_generated"):
        (_, first), *_, (_, last) = curves[name]
        assert first < 0.5, "it knows already"  # chance is 0.25, of 20 questions
        assert last > 0.6
