"""Atomic writes: kills, full disks, links, and several writers of one file."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datamodules.common.atomic import whole, write_whole

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("shared", [False, True])
def test_a_kill_before_the_rename_leaves_the_old_file(shared, tmp_path):
    path = tmp_path / "done.json"
    write_whole(path, "old")
    killed = (
        "import os, pathlib, signal; from datamodules.common.atomic import write_whole\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_whole(pathlib.Path({str(path)!r}), 'new', shared={shared})\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [each for each in tmp_path.iterdir() if each != path]
    assert [each.read_text() for each in left] == ["new"], (
        "the killed write leaves its temporary file"
    )

    write_whole(path, "newer", shared)
    assert path.read_text() == "newer"
    assert len(list(tmp_path.iterdir())) == 1 + shared, "the next write reuses its own name"


def test_the_new_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda *a: (calls.append("fsync"), fsync(*a)))
    monkeypatch.setattr("os.replace", lambda *a: (calls.append("replace"), replace(*a)))
    write_whole(tmp_path / "a", b"\0\n\r\n")
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "a").read_bytes() == b"\0\n\r\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("shared", [False, True])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(code, shared, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "metrics.csv"
    write_whole(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"'.*/metrics.csv'$") as raised:
        write_whole(path, "new", shared)
    assert raised.value.errno == code
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_fails_leaves_nothing(tmp_path):
    def half() -> None:
        with whole(tmp_path / "a") as file:
            file.write(b"half of it")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        half()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".a.partial").symlink_to(precious)
    write_whole(tmp_path / "a", "new")
    assert (precious.read_text(), (tmp_path / "a").read_text()) == ("mine", "new")


def test_others_may_read_the_file_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "a", "", shared=True)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_several_writers_of_one_file_leave_a_whole_one(tmp_path):
    path = tmp_path / "shard.tar.idx"
    contents = [bytes([number]) * 100_000 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_whole(path, content, shared=True), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
