"""Values of the command line that build no object: one line that names the key."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from experiments import CONFIG_DIR
from experiments.checks.keys import check_keys
from experiments.command.values import check_values, describe, fits

RECIPES = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_and_trial_passes(recipe, compose, tmp_path):
    for words in ([], ["trainer=fsdp"], ["trainer=ddp_sim", "debug=overfit", "logger=csv"]):
        config = compose([f"experiment={recipe}", *words], tmp_path)
        check_keys(config)
        check_values(config)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("optim.optimizer.lr=abc", "optim.optimizer.lr=abc must be a number"),
        ("optim.optimizer.lr=null", "optim.optimizer.lr=null must be a number"),
        ("optim.optimizer.betas=[0.9]", "optim.optimizer.betas=[0.9] must be a list of 2"),
        ("optim.scheduler.warmup=abc", "optim.scheduler.warmup=abc must be a number"),
        ("tuning.freeze=llm", "tuning.freeze=llm must be a list"),
        ("seed=null", "seed=null must be a whole number"),
        ("seed=1.5", "seed=1.5 must be a whole number"),
        ("seed=true", "seed=True must be a whole number"),
        ("seed=-1", "seed=-1 must be from 0 to 4294967295"),
        ("seed=4294967296", "seed=4294967296 must be from 0 to 4294967295"),
        ("name=null", "name=null must be text"),
        ("tags=abc", "tags=abc must be a list"),
        ("data.frames.image_size=big", "data.frames.image_size=big must be a whole number or null"),
        ("resume=abc", "resume=abc must be true or false"),
        (
            "callbacks.checkpoint.every_n_steps=null",
            "callbacks.checkpoint.every_n_steps=null must be a whole number",
        ),
        ("callbacks.heartbeat.every_s=abc", "callbacks.heartbeat.every_s=abc must be a number"),
        (
            "logger.wandb.init_timeout=abc",
            "logger.wandb.init_timeout=abc must be a whole number",
        ),
        ("trainer.max_epochs=abc", "trainer.max_epochs=abc must be a whole number or null"),
        ("trainer.max_epochs=0", "trainer.max_epochs=0 would train nothing"),
        ("trainer.max_steps=0", "trainer.max_steps=0 would train nothing"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1 must be 0 or more"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 must be 1 or more"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval=0 must be more than 0"),
        ("data.batch_size=1.5", "data.batch_size=1.5 must be a whole number"),
        ("data.stream.num_workers=-1", "data.stream.num_workers=-1 must be 0 or more"),
        ("module.packing=abc", "module.packing=abc must be a whole number or null"),
        ("model.rotary.sections=abc", "model.rotary.sections=abc must be a list"),
        (
            "+optim.optimizer.lrr=5",
            "optim.optimizer.lrr: AdamW has no argument lrr: did you mean optim.optimizer.lr?",
        ),
        (
            "+trainer.batch_size=5",
            "trainer.batch_size: Trainer has no argument batch_size: did you mean data.batch_size?",
        ),
        (
            "+tuning.rank=5",
            "tuning.rank: Tuning has no argument rank: leave it out (tuning takes checkpointing, ",
        ),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(word, line, compose, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole
        check_values(compose(["experiment=resume_probe", word], tmp_path))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["square", "pad", "crop", "fixed", "native"])
def test_frames_of_their_own_size_are_refused_by_an_encoder_of_squares(policy, compose, tmp_path):
    words = ["experiment=resume_probe", f"data/frames={policy}"]
    config = compose(words, tmp_path)
    if config.data.frames.image_size is not None:
        check_values(config)
        return
    with pytest.raises(ValueError, match=r"^the encoder reads squares of 32 x 32 pixels: choose d"):
        check_values(config)


def test_a_fixed_size_may_be_that_of_the_encoder(compose, tmp_path):
    sizes = [f"data.frames.policy.{side}=32" for side in ("height", "width")]
    check_values(compose(["experiment=resume_probe", "data/frames=fixed", *sizes], tmp_path))


@pytest.mark.parametrize(
    "word",
    [
        "+trainer.plugins=[]",
        "+optim.optimizer.amsgrad=true",
        "+callbacks.generations.count=3",
        "+callbacks.mine={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}",
        "+callbacks.throughput.known.x=1e12",
        "+logger.wandb.entity=me",  # passed on to wandb.init
        "+model.llm.config.rms_norm_eps=1e-5",
    ],
)
def test_an_argument_that_an_option_leaves_out_may_be_added(word, compose, tmp_path):
    config = compose(["experiment=resume_probe", word], tmp_path)
    check_keys(config)
    check_values(config)


def test_only_what_is_known_is_imported(compose, tmp_path, monkeypatch):
    """A target outside is left to the builder, which decides whether it is allowed."""
    (tmp_path / "spy.py").write_text("class Call: pass")
    monkeypatch.syspath_prepend(tmp_path)
    check_values(compose(["experiment=resume_probe", "+callbacks.x._target_=spy.Call"], tmp_path))
    assert "spy" not in sys.modules


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, float, True),
        (1, int, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (None, int, False),
        (None, int | None, True),
        ("a", Sequence[str], False),
        (["a"], Sequence[str], True),
        (["a", 1], Sequence[str], False),
        ([1, 2], tuple[float, float], True),
        ([1, 2, 3], tuple[float, float], False),
        ([1, 2, 3], tuple[float, ...], True),
        ({"a": "x"}, dict[str, int], False),
        ("abc", float | torch.Tensor, False),
        ({"_target_": "a.B"}, int, True),
        ("a", Literal["b"], False),
        ("runs", Path, True),
        (3, Path, False),
        ("x", Any, True),
    ],
)
def test_what_fits_an_annotation(value, hint, right):
    assert fits(value, hint) is right


def test_annotations_in_plain_words():
    assert describe(int | float | None) == "a number or null"
    assert describe(float | torch.Tensor) == "a number"
    assert describe(tuple[float, float]) == "a list of 2"
