"""Values that a run counts in optimizer steps: samples, validations, learning rates."""

import json

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from experiments.run.compose import build, share_steps
from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.optim import follow
from tests.experiments.test_train import metrics

#: Twelve steps of four micro-batches of one sample.
FOUR = [
    "trainer.limit_val_batches=1",
    "data.batch_size=1",
    "callbacks.generations=null",
    "callbacks.best=null",
    "scores=none",
    "test=false",
]


@pytest.fixture
def run(run_train, tmp_path):
    """`run(*overrides)` returns done.json of a run in one directory."""

    def act(*words, folder=tmp_path / "run"):
        run_train(folder, *FOUR, *words)
        return json.loads((folder / "done.json").read_text())

    return act


def column(folder, name):
    """Returns values by step, for rows that have one."""
    return [(int(row["step"]), float(row[name])) for row in metrics(folder) if row.get(name)]


def validations(folder):
    return [step for step, _ in column(folder, "val/loss")]


@pytest.mark.parametrize(
    ("words", "steps", "samples"),
    [
        (["trainer.limit_train_batches=8"], 2, 8),
        (["trainer.limit_train_batches=0.3", "trainer.max_epochs=2"], 6, 24),
        (["trainer.overfit_batches=2", "trainer.max_epochs=3"], 6, 6),
        (["trainer.max_steps=5"], 5, 20),
    ],
    ids=["limit", "share", "overfit", "max_steps"],
)
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_samples_are_those_that_were_seen(words, steps, samples, run):
    done = run(*words)
    assert (done["steps"], done["samples"]) == (steps, samples)


def trainer_of(compose, tiny, tmp_path, *words):
    config = compose([*tiny, *FOUR, *words], tmp_path)
    trainer = build(config.trainer, "trainer", logger=False)
    share_steps(trainer, build(config.data, "data"))
    return trainer


def test_a_limit_within_a_step_is_refused_in_one_line(compose, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"limit_train_batches=10 .* set it to 8 or 12, ") as found:
        trainer_of(compose, tiny, tmp_path, "trainer.limit_train_batches=10")
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"4 micro-batches on each of 1 ranks: set it to 4, or "):
        trainer_of(compose, tiny, tmp_path, "trainer.limit_train_batches=3")


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["trainer.val_check_interval=3"], [2, 5, 8, 11]),
        (["trainer.val_check_interval=0.4"], [3, 7, 11]),
        (["trainer.val_check_interval=3", "data.batch_size=4"], [2, 5, 8, 11]),
        (
            [
                "trainer.val_check_interval=5",
                "trainer.check_val_every_n_epoch=null",
                "trainer.max_epochs=2",
            ],
            [4, 9, 14, 19],
        ),
        (
            [
                "trainer.val_check_interval=6",
                "trainer.check_val_every_n_epoch=2",
                "trainer.max_epochs=2",
            ],
            [17, 23],
        ),
    ],
    ids=["steps", "share", "large_batches", "through_epochs", "every_second_epoch"],
)
def test_an_interval_of_validation_counts_steps(words, steps, run, tmp_path):
    run(*words)
    assert validations(tmp_path / "run") == steps


def test_two_ranks_validate_after_the_same_steps(run_train, run_ranks, tmp_path):
    words = ["trainer.val_check_interval=3", "trainer=ddp_sim", "trainer.max_steps=7"]
    run_ranks(2, lambda rank: run_train(tmp_path, *FOUR, *words))
    assert validations(tmp_path) == [2, 5]


def test_an_interval_longer_than_an_epoch_is_refused_in_steps(run):
    with pytest.raises(SystemExit, match=r"=13 optimizer steps .* has 12: set it to 12 or less"):
        run("trainer.val_check_interval=13")


@pytest.mark.parametrize("dies_at", [6, 7])
def test_a_resumed_run_validates_after_the_same_steps(dies_at, run, tmp_path, monkeypatch):
    """Also if the checkpoint is at the step after which validation runs."""
    words = ["trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=3"]
    step = VideoLLMModule.training_step

    def dying(self, batch, batch_idx):
        if self.trainer.global_step == dies_at:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VideoLLMModule, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run(*words)
    done = run(*words)
    assert validations(tmp_path / "run") == [2, 5, 8, 11]
    assert (done["steps"], done["samples"]) == (12, 48)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer, steps: lr_scheduler.ExponentialLR(optimizer, 0.9),
        lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
        lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps),
    ],
    ids=["exponential", "cosine", "linear"],
)
def test_any_schedule_of_pytorch_is_followed_from_its_start(make):
    """Schedulers that multiply the rate of the step before must not start from the last rate."""

    def train(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    def new():
        return SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)

    extended = new()
    train(extended, make(extended, 6), 6)
    whole = new()
    expected = [train(whole, scheduler := make(whole, 12), 6), train(whole, scheduler, 1)]
    scheduler = follow(extended, make, 12, 6)
    found = [extended.param_groups[0]["lr"], train(extended, scheduler, 1)]
    assert found == pytest.approx(expected)


def test_an_extended_run_follows_the_schedule_of_its_new_length(run, tmp_path):
    words = ["optim.scheduler.name=linear", "optim.scheduler.warmup=0.25"]
    run("trainer.max_steps=6", *words)
    done = run("trainer.max_steps=12", *words)
    assert (done["steps"], done["samples"]) == (12, 48)
    run("trainer.max_steps=12", *words, folder=tmp_path / "whole")
    rates, whole = (dict(column(tmp_path / name, "lr-AdamW")) for name in ("run", "whole"))
    assert rates[5] < whole[5], "the first training had a schedule for its own end"
    assert [rates[step] for step in range(6, 12)] == [whole[step] for step in range(6, 12)]
    assert list(rates) == list(whole) == list(range(12))
