"""A key that nothing reads is refused in a line that names the nearest real one."""

import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig

from experiments import CONFIG_DIR, start
from experiments.checks.keys import check_keys

BASE = ["experiment=resume_probe"]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("+optim.lr=5", "optim.lr: nothing reads this key: did you mean optim.optimizer.lr?"),
        ("+optim.x.lr=5", "optim.x.lr: nothing reads this key: did you mean optim.optimizer.lr?"),
        (
            "+optim.foo=5",
            "optim.foo: nothing reads this key: leave it out (optim has optim.optimizer, "
            "optim.scheduler)",
        ),
        ("+foo=5", "foo: nothing reads this key: leave it out"),
        ("+sed=5", "sed: nothing reads this key: did you mean seed?"),
        (
            "+callbacks.checkpiont.every_n_steps=5",
            "callbacks.checkpiont.every_n_steps: nothing reads this key: did you mean "
            "callbacks.checkpoint.every_n_steps?",
        ),
        ("+init_allow.unsed=[x]", "init_allow.unsed: nothing reads this key: did you mean "),
        ("+model.rotery={_target_: x.Y}", "model.rotery: nothing reads this key: did you mean "),
    ],
)
def test_a_key_that_nothing_reads(word, line, compose, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole
        check_keys(compose([*BASE, word], tmp_path))
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        ["+width=64", "model.llm.config.hidden_size=${width}"],
        ["+deep={a: {b: 64}}", "model.llm.config.hidden_size=${deep.a.b}"],
        ["+deep={a: [{b: 64}]}", "model.llm.config.hidden_size=${deep.a[0].b}"],
        ["+width=64", "model.llm.config.hidden_size=${oc.select:width,32}"],
        ["+width=64", "+deep=${width}", "model.llm.config.hidden_size='${oc.select:${deep},4}'"],
        ["+optim.base=0.1", "optim.optimizer.lr=${..base}"],
    ],
)
def test_a_key_that_an_interpolation_names_is_read(words, compose, tmp_path):
    check_keys(compose([*BASE, *words], tmp_path))


def test_only_typed_keys_of_an_evaluation_are_checked(compose, tmp_path):
    """A training from before may have recorded such a word, which had no effect."""
    config = compose([*BASE, "+optim.lr=5", "seed=1"], tmp_path)
    check_keys(config, ["seed=1"])
    with pytest.raises(ValueError, match=r"did you mean optim\.optimizer\.lr"):
        check_keys(config, ["+optim.lr=5"])


def own_recipe(folder: Path, text: str) -> DictConfig:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    path = [f"hydra.searchpath=[file://{folder}]"]
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose("train", [*path, "experiment=mine"])


def test_a_recipe_is_checked_as_well(tmp_path):
    with pytest.raises(ValueError, match=r"^optim\.lr: .* did you mean optim\.optimizer\.lr\?$"):
        check_keys(own_recipe(tmp_path, "defaults: [resume_probe]\noptim: {lr: 1e-3}"))


def test_a_recipe_may_have_keys_of_its_own(tmp_path):
    check_keys(own_recipe(tmp_path, "rate: 1e-3\noptim: {optimizer: {lr: '${rate}'}}"))


@pytest.mark.parametrize("word", ["+optim.lr=1,2", "+optim.lr=1"])
def test_a_sweep_is_refused_before_its_first_job(word, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-train", "-m", *BASE, "seed=0,1", word])
    with pytest.raises(SystemExit, match=r"^error: optim\.lr: .*did you mean optim\.optimizer\.lr"):
        start.main()
    assert not list(tmp_path.iterdir())
