"""Checkpoints are whole or absent, found when they are whole, and fit any number of ranks."""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import BATCHES, Ranks, Tiny, read_checkpoint, read_metrics, read_seen, train

from lightning_modules.checkpoint import BestCheckpoint, newest_whole
from lightning_modules.checkpoint.position import rescale
from lightning_modules.checkpoint.whole import MARKER, publish, remove_leftovers, what_is_wrong
from lightning_modules.checkpoint.write import DiskCheckpointIO
from lightning_modules.sharding import ShardedStrategy


def write(path: Path, step: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(3, 1000, generator=torch.Generator().manual_seed(step))
    torch.save({"global_step": step, "state_dict": {"a": noise[:1].clone(), "b": noise}}, path)
    return path


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Finding a whole one


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flip_in_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_without_marker(path: Path) -> None:
    path.unlink()
    (path / "parts").mkdir(parents=True)


DAMAGES = [cut, cut_one_byte, zero_tail, flip_in_the_middle, empty, folder_without_marker]


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink])
def test_a_damaged_last_one_falls_back_to_the_one_before(
    damage: Callable[[Path], None], tmp_path, caplog
):
    write(tmp_path / "previous.ckpt", 1)
    last = write(tmp_path / "last.ckpt", 2)
    assert newest_whole(tmp_path) == last
    assert not caplog.messages
    damage(last)
    assert newest_whole(tmp_path) == tmp_path / "previous.ckpt"
    (message,) = caplog.messages
    assert "last.ckpt" in message
    assert "previous.ckpt" in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_whole_one_the_run_is_refused_in_one_line(damage, tmp_path):
    damage(write(tmp_path / "last.ckpt"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*resume=false") as caught:
        newest_whole(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert newest_whole(tmp_path / "nowhere") is None
    (tmp_path / "last.partial").write_bytes(b"what a kill left")
    assert newest_whole(tmp_path) is None


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    """Anywhere in the file: in tensors, in names, in the directory at its end."""
    path = write(tmp_path / "last.ckpt")
    data, truth = path.read_bytes(), torch.load(path, weights_only=True)["state_dict"]
    rng, found = random.Random(0), 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        if what_is_wrong(path) is None:
            assert same(torch.load(path, weights_only=True)["state_dict"], truth)
        else:
            found += 1
    assert found > 150


def make_folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text(text)
    (path / "meta.pt").write_text(text)
    return path


def test_a_folder_is_whole_with_its_marker_and_all_of_its_bytes(tmp_path):
    for text in ("one", "three"):
        publish(
            make_folder(tmp_path / "last.partial", text),
            tmp_path / "last.ckpt",
            tmp_path / "previous.ckpt",
        )
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert newest_whole(tmp_path) == last
    assert [(p / "meta.pt").read_text() for p in (previous, last)] == ["one", "three"]
    os.truncate(last / "__0_0.distcp", 4)
    assert what_is_wrong(last) == "is damaged (__0_0.distcp has 4 of 5 bytes)"
    assert newest_whole(tmp_path) == previous
    (previous / MARKER).unlink()
    with pytest.raises(ValueError, match=r"4 of 5 bytes.*no whole.json"):
        newest_whole(tmp_path)


def test_files_and_folders_take_each_others_place(tmp_path):
    names = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in range(4):
        partial = tmp_path / "last.partial"
        make_folder(partial, str(step)) if step % 2 else write(partial, step)
        publish(partial, *names)
        assert newest_whole(tmp_path) == names[0]
    assert names[0].is_dir()
    assert names[1].is_file()
    publish(make_folder(tmp_path / "best.partial", "1"), tmp_path / "best.ckpt")
    publish(make_folder(tmp_path / "best.partial", "2"), tmp_path / "best.ckpt")
    assert (tmp_path / "best.ckpt" / "meta.pt").read_text() == "2"
    (tmp_path / "x.partial").mkdir()
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}


# What is in it


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing disturbs: 24 steps of 2 micro-batches in two epochs."""
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


def test_a_damaged_last_one_does_not_become_the_one_before(tmp_path):
    train(tmp_path, max_epochs=1, last={"every_n_steps": 5})
    cut(tmp_path / "checkpoints/last.ckpt")

    def check(module: Tiny, step: int) -> None:
        assert not (tmp_path / "checkpoints/last.ckpt").exists()
        assert what_is_wrong(tmp_path / "checkpoints/previous.ckpt") is None
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        train(tmp_path, module=Tiny(tmp_path, at_batch=check))


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
    """Mid-step, at ends of epochs and before validations, which come every third step."""
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
    """Its learning rate does not depend on how long it trains."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """17 steps of 2 micro-batches, of which an epoch has 12; validation after every third."""
    folder = tmp_path_factory.mktemp("steady")
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}
    train(folder, module=Steady(folder), max_steps=17, **options)
    return folder


@pytest.mark.parametrize("ends", [[12], [2, 3, 14, 15]])
def test_more_max_steps_go_on_where_fewer_have_ended(ends, steady, tmp_path):
    """Within an epoch, behind a validation, at the end of an epoch."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 0.25}
    for end in [*ends, 17]:
        trainer = train(tmp_path, module=Steady(tmp_path), max_steps=end, **options)
        assert trainer.global_step == end
    assert_same_run(tmp_path, steady)


def fake_world(folder: Path, world: int) -> None:
    """Makes the checkpoint one of several ranks: each of these counts its share alone."""
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
    """Steps of 4 micro-batches; validation every 6, so that some come within a step."""
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
    """kill -9 of one of two ranks, then one, then four; by DDP with steps of 2 micro-batches."""
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


# Kills and full disks


def test_killed_at_random_moments_of_a_save_one_is_always_whole(tmp_path):
    """Each step saves 30 MB, so most moments are within a save."""
    rng, steps, save_s = random.Random(1), 0, 0.0
    for attempt in range(10):
        run = Ranks(tmp_path, every=1, ballast=30, options={"max_epochs": 40}).start()
        run.wait_for_step(steps)
        if attempt == 0:
            started = time.monotonic()
            run.wait_for_step(2)
            save_s = (time.monotonic() - started) / 2
        time.sleep(rng.random() * 3 * save_s)
        run.signal(signal.SIGKILL, 0)
        run.wait()
        # A step begins once the one before it is saved.
        saved = max((seen[0] for seen in read_seen(tmp_path)), default=0)
        newest = newest_whole(tmp_path / "checkpoints")
        steps = 0 if newest is None else torch.load(newest, weights_only=True)["global_step"]
        assert steps >= saved
    assert steps > 1


FULL = r"error: cannot save .*last.ckpt \(.*\): a checkpoint needs {needs}, .* are free; .*room.*"


def check_full(run: Ranks, before: dict[str, bytes], needs: str) -> None:
    for rank in range(run.world):
        line = run.said(rank).strip().splitlines()[-1]
        assert re.fullmatch(FULL.format(needs=needs), line), run.said(rank)
    after = contents(run.folder / "checkpoints")
    assert {name: data for name, data in after.items() if "best" not in name} == before
    assert newest_whole(run.folder / "checkpoints") is not None


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("sharded", [False, True])
def test_no_room_for_a_file_ends_in_one_line_of_all_ranks(sharded, tmp_path):
    world, no_validation = 2, {"limit_val_batches": 0}
    first = Ranks(tmp_path, world, sharded, ballast=5, options={"max_steps": 3} | no_validation)
    assert first.start().wait() == [0, 0], first.said()
    before = contents(tmp_path / "checkpoints")
    full = Ranks(tmp_path, world, sharded, every=1, ballast=5, file_limit=1_000_000)
    full.options = no_validation
    assert full.start().wait() == [1, 1]
    check_full(full, before, "5 MB")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_full_disk_leaves_what_was_saved(sharded, tmp_path):
    """A disk of 13 MB has room for two checkpoints of 5 MB, but not for a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=13M", "small", disk])
    if mounted.returncode:
        pytest.skip("cannot mount")
    try:
        first = Ranks(disk / "run", 1, sharded, every=1, ballast=5)
        first.options = {"max_steps": 2, "limit_val_batches": 0}
        code = first.start().wait()
        assert code == [1], first.said()
        before = contents(disk / "run/checkpoints")
        assert {name.split("/")[0] for name in before} == {"last.ckpt", "previous.ckpt"}
        again = Ranks(disk / "run", 1, sharded, every=1, ballast=5, options={"max_steps": 9})
        again.options["limit_val_batches"] = 0
        assert again.start().wait() == [1]
        check_full(again, before, "5 MB")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_other_kind_of_checkpoint_is_refused_in_a_line_that_says_what_reads_it(tmp_path):
    (tmp_path / "shards.ckpt").mkdir()
    (tmp_path / "one.ckpt").touch()
    with pytest.raises(ValueError, match="saved in shards: go on with trainer=fsdp"):
        DiskCheckpointIO().load_checkpoint(tmp_path / "shards.ckpt")
    with pytest.raises(ValueError, match="saved as one file: go on with trainer=ddp"):
        ShardedStrategy().load_checkpoint(tmp_path / "one.ckpt")
