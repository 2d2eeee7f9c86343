"""Refusals of Hydra end in one line that says what to type."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException

from experiments import start
from experiments.command.old_words import NEW_WORDS
from experiments.run.hydra_errors import describe

ROOT = Path(__file__).parents[3]

SAID = {
    "optm.lr=3": "optm.lr=3 sets a key that is not there: did you mean optim.optimizer.lr?",
    "optim.optimizer.lrr=3": "optim.optimizer.lrr=3 sets a key that is not there: did you mean "
    "optim.optimizer.lr? +optim.optimizer.lrr=3 adds it, if torch.optim.AdamW has this argument",
    "trainer.plugins=3": "trainer.plugins=3 sets a key that is not there: +trainer.plugins=3 adds "
    "it, if lightning.Trainer has this argument",
    "rotery=mrope": "rotery=mrope sets a key that is not there: did you mean rotary=mrope?",
    "xyz=3": "xyz=3 sets a key that is not there: ropelab-train --cfg job shows every key",
    "rotary=foo": "rotary=foo is not there: choose one of hope, mrope, qwen2_5_vl, tad, vanilla, "
    "videorope, vrope",
    "scores=[mc,perplexty]": "scores=perplexty is not there: did you mean scores=perplexity? "
    "(default, hallucer, mc, none, open, perplexity)",
    "data/sampler=x": "data/sampler=x is not there: choose one of fps, spaced, uniform",
    "data/frames=x": "data/frames=x is not there: choose one of crop, fixed, native, pad, square",
    "rotary=videorop": "rotary=videorop is not there: did you mean rotary=videorope? (hope, mrope, "
    "qwen2_5_vl, tad, vanilla, videorope, vrope)",
    "tiles=null": "tiles=null: a group takes one of its options; leave tiles=null out, or write "
    "~tiles for none",
    "scale=tiny": "experiment=resume_probe has no scale=tiny: leave it out, or choose a recipe "
    "that has it (clip_context, ppllava_dpo, ppllava_vicuna7b_image_video, "
    "ppllava_vicuna7b_multi_image, ppllava_vicuna7b_video, videorope_qwen2_7b)",
    "data=preference_tiny": "data=preference_tiny is now data=tiny",
    "+seed=2": "+seed=2: seed is there already: write seed=2",
    "hydra.job.num=x": "Error merging override hydra.job.num=x: Value 'x' of type 'str' could not "
    "be converted to Integer",
}


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]], ids=["run", "multirun"])
@pytest.mark.parametrize(("word", "said"), SAID.items(), ids=SAID.keys())
def test_what_hydra_refuses_is_one_line(word, said, sweep, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-train", *sweep, "experiment=resume_probe", word])
    with pytest.raises(SystemExit) as caught:
        start.main()
    assert caught.value.code == f"error: {said}"


@pytest.mark.parametrize("word", NEW_WORDS)
def test_a_word_that_has_gone_is_answered_by_the_new_words(word, compose, tmp_path):
    with pytest.raises(MissingConfigException) as caught:
        compose([word], tmp_path)
    assert describe(caught.value) == f"error: {word} is now {NEW_WORDS[word]}"
    compose(NEW_WORDS[word].split(), tmp_path)


def test_a_misspelt_recipe_is_answered_by_the_nearest(compose, tmp_path):
    with pytest.raises(MissingConfigException) as caught:
        compose(["experiment=ppllava_vicuna_7b_video"], tmp_path)
    assert "did you mean experiment=ppllava_vicuna7b_video? (" in describe(caught.value)


@pytest.mark.parametrize("program", ["evaluate", "plan", "reference"])
def test_the_other_programs_say_it_too(program, tmp_path):
    words = [f"run={tmp_path}"] if program == "evaluate" else []
    ended = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", *words, "optm=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: optm=3 sets a key that is not there")
    assert len(ended.stderr.splitlines()) == 1


def test_a_refused_multirun_says_nothing_of_hydras_variables(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-train", "-m", "experiment=resume_probe", "seed=0,0"])
    with pytest.raises(SystemExit, match=r"^two jobs are the same run, .*leave one out$"):
        start.main()


def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["ropelab-train", "optm=3"])
    with pytest.raises(ConfigCompositionException):
        start.main()


def test_a_recipe_of_ones_own_is_named_as_it_is_typed(monkeypatch, tmp_path, compose):
    configs = tmp_path / "configs"
    (configs / "experiment" / "local").mkdir(parents=True)
    for name in ("clip_context", "local/mine"):
        (configs / "experiment" / f"{name}.yaml").touch()
    monkeypatch.setattr("experiments.run.hydra_errors.CONFIG_DIR", configs)
    for word, said in (
        ("local/mien", "experiment=local/mien is not there: did you mean experiment=local/mine?"),
        (
            "clip_contxt",
            "experiment=clip_contxt is not there: did you mean experiment=clip_context?",
        ),
    ):
        with pytest.raises(MissingConfigException) as caught:
            compose([f"experiment={word}"], tmp_path)
        assert describe(caught.value) == f"error: {said} (clip_context, local/mine)"


def test_the_beginning_of_an_option_is_enough_for_a_suggestion(compose, tmp_path):
    with pytest.raises(MissingConfigException) as caught:
        compose(["llm=smollm"], tmp_path)
    assert "did you mean llm=smollm2_135m? (" in describe(caught.value)
