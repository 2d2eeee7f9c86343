"""A checkpoint is complete or absent, and the newest complete one is found."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint import newest_whole
from lightning_modules.checkpoint.whole import MARKER, publish, remove_leftovers, what_is_wrong
from tests.helpers.tiny_run import Tiny, train


def write(path: Path, step: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randn(3, 1000, generator=torch.Generator().manual_seed(step))
    torch.save({"global_step": step, "state_dict": {"a": noise[:1].clone(), "b": noise}}, path)
    return path


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is complete .*resume=false"
    ) as caught:
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


def test_a_damaged_last_one_does_not_become_the_one_before(tmp_path):
    train(tmp_path, max_epochs=1, last={"every_n_steps": 5})
    cut(tmp_path / "checkpoints/last.ckpt")

    def check(module: Tiny, step: int) -> None:
        assert not (tmp_path / "checkpoints/last.ckpt").exists()
        assert what_is_wrong(tmp_path / "checkpoints/previous.ckpt") is None
        raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        train(tmp_path, module=Tiny(tmp_path, at_batch=check))
