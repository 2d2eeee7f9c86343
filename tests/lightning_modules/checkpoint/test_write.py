"""A save that is killed or finds no space leaves a complete checkpoint, and says so in one line."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import newest_whole
from lightning_modules.checkpoint.write import DiskCheckpointIO
from lightning_modules.distributed.sharding import ShardedStrategy
from tests.helpers.tiny_run import Ranks, read_seen


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_of_a_save_one_is_always_whole(moments, tmp_path):
    """Each step saves 30 MB, so most moments are within a save."""
    rng, steps, save_s = random.Random(moments), 0, 0.0
    for attempt in range(moments):
        run = Ranks(tmp_path, every=1, ballast=30, options={"max_epochs": 40}).start()
        run.wait_for_step(steps)
        if attempt == 0:
            started = time.monotonic()
            run.wait_for_step(2)
            save_s = (time.monotonic() - started) / 2
        time.sleep(rng.random() * 3 * save_s)
        run.signal(signal.SIGKILL, 0)
        run.wait()
        # A step begins once the step before it is saved.
        saved = max((seen[0] for seen in read_seen(tmp_path)), default=0)
        newest = newest_whole(tmp_path / "checkpoints")
        steps = 0 if newest is None else torch.load(newest, weights_only=True)["global_step"]
        assert steps >= saved
    assert steps > 1


FULL = r"error: cannot save .*last.ckpt \(.*\): a checkpoint needs {needs}, .* are free; .* space.*"


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
