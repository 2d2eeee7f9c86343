"""A run continues from its checkpoint to the same end, with any number of ranks."""

import signal
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import BestCheckpoint, newest_whole
from lightning_modules.checkpoint.position import rescale
from lightning_modules.checkpoint.whole import what_is_wrong
from tests.helpers.tiny_run import (
    BATCHES,
    Ranks,
    Tiny,
    read_checkpoint,
    read_metrics,
    read_seen,
    train,
)

# Contents of a checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without interruption: 24 steps of 2 micro-batches in two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, accumulate_grad_batches=2, val_check_interval=0.25)
    return folder


def test_everything_loads_as_plain_containers(whole):
    last, best = read_checkpoint(whole), read_checkpoint(whole, "best.ckpt")
    assert last["world_size"] == 1
    (state,) = last["callbacks"].values()
    assert state["best"] == pytest.approx(
        min(float(row["val/loss"]) for row in read_metrics(whole) if row["val/loss"])
    )
    assert "optimizer_states" not in best
    assert best["state_dict"].keys() == last["state_dict"].keys()


def test_no_warnings_on_resume_after_a_move_and_without_validation_data(tmp_path, recwarn):
    options = {"limit_val_batches": 0, "max_epochs": 1}
    train(tmp_path / "a", **options)
    assert not (tmp_path / "a/checkpoints/best.ckpt").exists()
    (tmp_path / "a").rename(tmp_path / "b")
    train(tmp_path / "b", **options | {"max_epochs": 2})
    assert [w for w in recwarn if "checkpoint" in str(w.message).lower()] == []
    assert read_checkpoint(tmp_path / "b")["global_step"] == 2 * BATCHES


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    other = BestCheckpoint(tmp_path, monitor="val/accuracy", filename="accurate.ckpt")
    with pytest.raises(ValueError, match=r"val/accuracy is not logged .*which logs .*val/loss"):
        train(tmp_path, other, max_epochs=1)


# Going on


def assert_same_run(cut: Path, whole: Path, tolerance: float = 0) -> None:
    """The same samples in every step, the same curves, the same weights."""
    steps = {tuple(seen) for seen in read_seen(cut)}
    assert steps == {tuple(seen) for seen in read_seen(whole)}
    ours, theirs = read_checkpoint(cut), read_checkpoint(whole)
    assert ours["global_step"] == theirs["global_step"]
    torch.testing.assert_close(
        ours["state_dict"], theirs["state_dict"], rtol=tolerance, atol=tolerance
    )
    if not tolerance:
        assert read_metrics(cut) == read_metrics(whole)


@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.parametrize("batch", [6, 13, 24, 26, 38])
def test_an_exception_anywhere_and_the_run_goes_on_to_the_same_end(batch, every, whole, tmp_path):
    """Stops within a step, at ends of epochs and before validations, which run every third step."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}
    count = 0

    def die(module: Tiny, step: int) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise RuntimeError("killed")

    last = {"every_n_steps": every}
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, module=Tiny(tmp_path, at_batch=die), last=last, **options)
    train(tmp_path, last=last, **options)
    assert_same_run(tmp_path, whole)


class Steady(Tiny):
    """Its learning rate does not depend on the length of the training."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """17 steps of 2 micro-batches, 12 micro-batches per epoch; every third step validates."""
    folder = tmp_path_factory.mktemp("steady")
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}
    train(folder, module=Steady(folder), max_steps=17, **options)
    return folder


@pytest.mark.parametrize("ends", [[12], [2, 3, 14, 15]])
def test_more_max_steps_go_on_where_fewer_have_ended(ends, steady, tmp_path):
    """Stops within an epoch, after a validation, and at the end of an epoch."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}
    for end in [*ends, 17]:
        trainer = train(tmp_path, module=Steady(tmp_path), max_steps=end, **options)
        assert trainer.global_step == end
    assert_same_run(tmp_path, steady)


def fake_world(folder: Path, world: int) -> None:
    """Turns the checkpoint into one of several ranks, each of which counts only its own share."""
    path = folder / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["world_size"] = world
    for counts in map(
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].get, ("current", "total")
    ):
        behind = counts["processed"] - counts["completed"]
        for name in counts:
            counts[name] = counts["processed"] // world
        counts["completed"] -= behind
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def fours(tmp_path_factory):
    """Steps of 4 micro-batches; validation every 6, so some validations run within a step."""
    folder = tmp_path_factory.mktemp("fours")
    train(folder, accumulate_grad_batches=4, val_check_interval=0.25)
    return folder


@pytest.mark.parametrize(("world", "batch"), [(2, 5), (4, 13), (2, 24), (4, 26), (2, 45)])
def test_a_checkpoint_of_more_ranks_is_one_of_as_many_micro_batches(world, batch, fours, tmp_path):
    options = {"accumulate_grad_batches": 4, "val_check_interval": 0.25}
    count = 0

    def die(module: Tiny, step: int) -> None:
        nonlocal count
        count += 1
        if count == batch:
            raise RuntimeError("killed")

    last = {"every_n_steps": 1}
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path, module=Tiny(tmp_path, at_batch=die), last=last, **options)
    fake_world(tmp_path, world)
    train(tmp_path, last=last, **options)
    assert_same_run(tmp_path, fours)


def test_micro_batches_that_do_not_divide_are_refused_with_both_numbers(tmp_path):
    train(tmp_path, max_steps=3)
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"after 3 micro-batches .1 ranks.*2 ranks cannot share"):
        rescale(checkpoint, 2)


def test_ranks_that_die_are_followed_by_other_numbers_of_them(whole, tmp_path):
    """kill -9 of one of two ranks, then one, then four; DDP with steps of 2 micro-batches."""
    pair = Ranks(tmp_path, 2, every=1, slow=0.02, options={"val_check_interval": 0.25}).start()
    pair.wait_for_step(7)
    pair.signal(signal.SIGKILL, 1)
    assert pair.wait()[1] == -signal.SIGKILL
    alone = Ranks(tmp_path, 1, every=1, slow=0.02)
    alone.options = {"val_check_interval": 0.25, "accumulate_grad_batches": 2}
    alone.start().wait_for_step(16)
    alone.signal(signal.SIGTERM, 0)
    assert alone.wait() == [75]
    last = Ranks(tmp_path, 2, every=1, options={"val_check_interval": 0.25})
    assert last.start().wait() == [0, 0], last.said()
    assert_same_run(tmp_path, whole, tolerance=1e-6)


def test_shards_are_whole_and_fit_another_number_of_ranks(whole, tmp_path):
    pair = Ranks(tmp_path, 2, sharded=True, every=1, slow=0.02).start()
    pair.wait_for_step(9)
    pair.signal(signal.SIGKILL, 1)
    pair.wait()
    last = newest_whole(tmp_path / "checkpoints")
    assert last is not None
    assert last.is_dir()
    assert sum(1 for _ in last.glob("*.distcp")) == 2
    alone = Ranks(tmp_path, 1, sharded=True, options={"accumulate_grad_batches": 2})
    assert alone.start().wait() == [0], alone.said()
    assert {tuple(seen) for seen in read_seen(tmp_path)} == {tuple(s) for s in read_seen(whole)}
    best = tmp_path / "checkpoints/best.ckpt"
    assert what_is_wrong(best) is None
    assert best.is_dir()
