"""Whole runs that score held-out questions: their files, any number of ranks, and again later."""

import json
import math
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
    "test=true",
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
    first, validation, blind = read_scores(scored)
    assert [v["condition"] for v in (first, validation, blind)] == ["full", "full", "blind"]
    assert [v["step"] for v in (first, validation, blind)] == [1, 2, 2]
    rows = {row["name"]: row for row in validation["scores"]}
    assert rows.keys() == NAMES
    counts = {name: row["count"] for name, row in rows.items()}
    assert (counts["perplexity"], counts["mc_generated"], counts["pair_unparsed"]) == (11, 3, 6)
    assert (counts["pair_overall"], counts["open_f1"]) == (3, 2)
    assert rows["mc_generated"]["parser"].startswith("parse_letter ")
    assert rows["mc_generated"]["max_new_tokens"] == 16
    assert rows["mc_likelihood"]["parser"] is None
    better = {name: rows[name]["higher_is_better"] for name in ("mc_unparsed", "pair_yes_bias")}
    assert better == {"mc_unparsed": False, "pair_yes_bias": None}
    assert rows["open_f1"]["higher_is_better"] is True
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
    _, full, blind = read_scores(scored)
    for prefix, validation, count in (("val", full, 2), ("blind", blind, 1)):
        for row in validation["scores"]:
            assert metrics[f"{prefix}/{row['name']}"] == pytest.approx(row["value"], rel=1e-5)
            assert len(curves[f"{prefix}/{row['name']}"]) == count


def read_answers(folder, name):
    lines = (folder / "answers" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_sample_has_a_line_that_its_scores_are_made_of(scored):
    files = sorted(path.name for path in (scored / "answers").iterdir())
    steps = ["step-00000001", "step-00000002", "step-00000002-blind"]
    assert files == sorted(f"{step}.jsonl" for step in steps)
    for step, validation in zip(steps, read_scores(scored), strict=True):
        lines = read_answers(scored, step)
        assert len({line["key"] for line in lines}) == len(lines) == 11
        assert {line["condition"] for line in lines} == {validation["condition"]}
        for row in validation["scores"]:
            terms = [v for line in lines if (v := line["values"].get(row["name"])) is not None]
            if row["name"] == "perplexity":  # it is no mean over samples, but its parts are there
                total = sum(line["log_prob"] for line in lines)
                value = math.exp(-total / sum(line["tokens"] for line in lines))
                assert value == pytest.approx(row["value"], rel=1e-5)
            else:
                assert len(terms) == row["count"], row["name"]
                assert sum(terms) / len(terms) == pytest.approx(row["value"]), row["name"]


def test_a_line_says_what_was_asked_said_and_right(scored):
    letters, basic, hallucinated, free = read_answers(scored, "step-00000002")[:4]
    assert letters["key"] == "shard-000000.tar/001000000"
    assert letters["prompt"].startswith("<|user|><visual>\nWhat color is shown?\nA. red")
    assert (letters["frames"], len(letters["options"])) == ([4], 4)
    assert letters["right"][0] in "ABCD"
    likeliest = max(range(4), key=letters["option_log_probs"].__getitem__)
    right = "ABCD"[likeliest] == letters["right"][0]
    assert letters["values"]["mc_likelihood"] == float(right)
    assert letters["parsed"].keys() == {"mc_generated"}
    assert isinstance(letters["answer"], str)
    assert basic["group"] == hallucinated["group"] == "clip 250000"
    assert (basic["right"], hallucinated["right"]) == (["yes"], ["no"])
    assert free["values"].keys() == {"open_exact", "open_f1"}
    assert free["tokens"] >= 1


def test_a_blind_model_sees_no_frames(scored):
    full, blind = (read_answers(scored, f"step-00000002{end}") for end in ("", "-blind"))
    assert [line["frames"] for line in full] == [[4]] * 11
    assert [line["frames"] for line in blind] == [[]] * 11
    assert [line["prompt"] for line in blind] == [
        line["prompt"].replace("<visual>", "") for line in full
    ]
    assert [line["right"] for line in blind] == [line["right"] for line in full]
    assert all(b["log_prob"] != f["log_prob"] for b, f in zip(blind, full, strict=True))


def test_the_best_checkpoint_is_kept_by_a_score(scored):
    perplexity = {
        validation["step"]: row["value"]
        for validation in read_scores(scored)
        for row in validation["scores"]
        if row["name"] == "perplexity" and validation["condition"] == "full"
    }
    best = read_checkpoint(scored / "checkpoints" / "best.ckpt")["global_step"]
    assert best == max(perplexity, key=perplexity.__getitem__) == 1, "training made it fall"


def test_steps_that_are_taken_again_replace_their_scores(tmp_path):
    book = ScoreBook(tmp_path, "run")
    for step, value in ((2, "a"), (4, "b"), (6, "c"), (4, "d"), (8, "e")):
        book.write({"step": step, "value": value})
        book.write_answers(step, "full", [{"key": value}])
    assert [v["value"] for v in read_scores(tmp_path)] == ["a", "d", "e"]
    for condition, value in (("blind", "f"), ("blind", "g"), ("other", "h")):
        book.write({"step": 8, "condition": condition, "value": value})
        book.write_answers(8, condition, [{"key": value}])
    assert [v["value"] for v in read_scores(tmp_path)] == ["a", "d", "e", "g", "h"]
    files = sorted(path.name for path in book.answers.iterdir())
    names = ("2", "4", "8-blind", "8-other", "8")
    assert files == [f"step-0000000{name}.jsonl" for name in names]
    assert read_answers(tmp_path, "step-00000004")[0]["key"] == "d"
    book.write({"step": 8, "condition": "full", "value": "i"})
    book.write_answers(8, "full", [])
    assert [v["value"] for v in read_scores(tmp_path)] == ["a", "d", "i"]
    assert not list(book.answers.glob("*blind*")), "they were said by other weights"


def test_keys_that_are_alike_without_their_folders_stay_whole(tmp_path):
    book = ScoreBook(tmp_path, "run")
    for keys in (["x/a.tar/1", "x/b.tar/1"], ["x/a.tar/1", "y/a.tar/1"]):
        book.write_answers(1, "full", [{"key": key} for key in keys])
        kept = [line["key"] for line in read_answers(tmp_path, "step-00000001")]
        assert kept == (["a.tar/1", "b.tar/1"] if keys[1] == "x/b.tar/1" else keys)


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
    for path in (whole / "answers").iterdir():
        assert (again / "answers" / path.name).read_text() == path.read_text()


def test_a_trained_model_is_scored_on_other_shards(scored, tmp_path, monkeypatch):
    """In a place without the shards of the training."""
    out = tmp_path / "out"
    shards = shutil.copytree(scored / "shards" / "val", tmp_path / "held-out")
    words = [f"run={scored}", f"data.val={shards}", f"hydra.run.dir={out}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-evaluate", *words])
    evaluate.main()
    (again, blind), (_, before, blind_before) = read_scores(out), read_scores(scored)
    for now, then in zip(blind["scores"], blind_before["scores"], strict=True):
        assert now == {**then, "value": pytest.approx(then["value"], rel=1e-5)}
    assert again["scores"] == [
        {**row, "value": pytest.approx(row["value"], rel=1e-5)} for row in before["scores"]
    ]
    assert (again["step"], again["data"], again["prompt"]) == (2, before["data"], before["prompt"])
    trained = json.loads((scored / "done.json").read_text())
    assert again["weights"] == {"from": str(scored), "sha256": trained["weights_sha256"]}
    metrics = json.loads((out / "done.json").read_text())["metrics"]
    names = {"loss", *NAMES}
    assert metrics.keys() == {f"{prefix}/{name}" for prefix in ("val", "blind") for name in names}


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
        book = ScoreBook(tmp_path / f"{world}", "run")
        options = {"logger": False, "enable_checkpointing": False, "callbacks": [book]}
        engine = build(config.trainer, "trainer", **options)
        data = build(config.data, "data")
        engine.validate(module, datamodule=data, verbose=False)
        logged = {name: float(value) for name, value in engine.callback_metrics.items()}
        return module.scored, logged

    alone, _ = validate(1)
    assert alone.keys() == NAMES
    lines = read_answers(tmp_path / "1", "step-00000000")
    overrides = [f"trainer={trainer}", "trainer.devices=2"]
    for found, logged in run_ranks(2, lambda rank: validate(2, *overrides)):
        assert found.keys() == NAMES
        for name, facts in alone.items():
            assert found[name]["count"] == facts["count"], name
            exact = facts["value"] if name != "perplexity" else pytest.approx(facts["value"])
            assert found[name]["value"] == exact, name
            assert logged[f"val/{name}"] == pytest.approx(facts["value"]), name
    shared = read_answers(tmp_path / "2", "step-00000000")
    assert [{**line, "log_prob": 0, "option_log_probs": 0} for line in shared] == [
        {**line, "log_prob": 0, "option_log_probs": 0} for line in lines
    ]


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
