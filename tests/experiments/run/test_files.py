"""Files in a run directory are checked before they are opened: links, pipes, bombs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from experiments import report
from experiments.directory.run_directory import open_locked, read_former
from experiments.launcher.job import Job
from experiments.run import lock, read
from experiments.run.files import check_files, open_file, read_yaml
from lightning_modules.checkpoint.whole import MARKER, what_is_wrong
from tests.experiments.reporting.test_report import write_run

#: Files that our programs open. They create and rename the `.partial` files.
OPENED = [
    *(
        "run.lock",
        "status.json",
        ".status.json.partial",
        "done.json",
        "metrics.csv",
        "samples.jsonl",
    ),
    *("config.yaml", ".config.yaml.partial", "command.txt", "versions.json", "run_id", "train.log"),
    *("logged.jsonl", "generations.jsonl", "needle.json", "scores.json", "stdout.log"),
    *("slurm.json", ".hydra/overrides.yaml", ".hydra/hydra.yaml", ".hydra/.frozen.yaml.partial"),
    *("checkpoints/last.ckpt", "checkpoints/best.ckpt"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run directory."""
    folder = write_run(tmp_path / "runs" / "0", "tad", 0)
    (folder / "checkpoints").mkdir()
    return folder


@pytest.fixture
def precious(tmp_path) -> Path:
    path = tmp_path / "precious"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("name", OPENED)
def test_a_run_opens_no_link_that_leads_out(name, folder, precious, tmp_path):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    for take in (check_files, open_locked):
        with pytest.raises(ValueError, match=r"is a link to .*/precious, outside of its folder"):
            take(folder)
    assert precious.read_text() == "mine"
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "new")  # writing would create them
    with pytest.raises(ValueError, match=r"is a link to .*/new, outside of its folder"):
        open_locked(folder)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", OPENED)
def test_a_run_waits_for_no_pipe(name, folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is neither a file nor a folder: remove it"):
        open_locked(folder)


@pytest.mark.parametrize("name", ["checkpoints", ".hydra"])
def test_folders_that_are_written_to_are_no_links_out(name, folder, tmp_path):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*/elsewhere, outside of its folder"):
        open_locked(folder)


def test_links_inside_of_a_run_and_to_folders_of_data_are_good(folder, tmp_path):
    (folder / "real.csv").write_text("")
    (folder / "metrics.csv").unlink()
    (folder / "metrics.csv").symlink_to("real.csv")
    (folder / "shards").symlink_to(tmp_path)
    check_files(folder)
    (tmp_path / "picked").symlink_to(folder)
    check_files(tmp_path / "picked")
    check_files(tmp_path / "nothing there")


def test_the_lock_is_no_link_even_inside(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "run.lock").symlink_to("notes.txt")
    with pytest.raises(ValueError, match=r"run.lock is a link or not a file: remove it"):
        lock.take(folder)
    with pytest.raises(ValueError, match=r"run.lock is a link or not a file: remove it"):
        lock.holder(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_lock_that_is_a_pipe_is_listed(folder):
    os.mkfifo(folder / "run.lock")
    (state,) = read.read_runs([folder])
    assert state.state == "damaged"
    assert "run.lock is a link or not a file" in state.reason


def test_a_link_that_comes_between_is_not_followed(folder, precious, monkeypatch):
    """A check is not enough: the file may be exchanged before it is opened."""
    (folder / "run.lock").symlink_to(precious)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    with pytest.raises(OSError, match="symbolic links"):
        open_file(folder / "run.lock", os.O_RDWR | os.O_CREAT)


def test_a_checkpoint_that_is_a_pipe_is_not_read(folder):
    last = folder / "checkpoints" / "last.ckpt"
    os.mkfifo(last)
    assert what_is_wrong(last) == "is not a file"
    last.unlink()
    last.mkdir()
    os.mkfifo(last / MARKER)
    assert what_is_wrong(last) == f"is not complete (no {MARKER})"


def test_the_log_of_a_run_is_not_written_through_a_link(folder, precious, tmp_path):
    """Hydra opens it before our program begins."""
    (folder / "train.log").symlink_to(precious)
    for words in ([], ["-m"]):
        key = f"hydra.sweep.dir={tmp_path}/runs hydra.sweep.subdir" if words else "hydra.run.dir"
        command = [
            sys.executable,
            "-m",
            "experiments.start",
            *words,
            *f"{key}={'0' if words else folder}".split(),
        ]
        cwd = Path(__file__).parents[3]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"error: {folder}/train.log is a link to")
        assert len(ended.stderr.strip().splitlines()) == 1
    assert precious.read_text() == "mine"


def bomb(levels: int = 8, width: int = 9) -> str:
    """Returns nested lists with width ** levels leaves."""
    lines = [f"l0: &l0 [{', '.join('x' * width)}]"]
    for n in range(1, levels):
        lines.append(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]")
    return "\n".join([*lines, f"seed: *l{levels - 1}"])


BAD = {
    "aliases": (bomb(), "has aliases"),
    "an anchor": ("seed: &a 1", "has aliases"),
    "depth": ("seed: " + 200 * "[" + 200 * "]", "is nested deeper than 100 levels"),
    "more depth": ("seed: " + 200_000 * "[", "is not valid YAML|is nested deeper than"),
    "depth of blocks": ("\n".join(n * " " + "a:" for n in range(1000)), "is nested deeper than"),
    "size": ("a: " + 5_000_000 * "x", "has 5000003 bytes, more than 4000000"),
    "bytes": ("a: \udcff", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "why"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"])
def test_a_bomb_in_yaml_is_one_line(name, text, why, folder):
    path = folder / name
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=why) as caught:
        read_yaml(path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SystemExit, match=why):
        report.main([str(folder)])
    (state,) = read.read_runs([folder])
    assert state.settings.value("seed") in (None, "0")
    if name == "config.yaml":
        with pytest.raises(ValueError, match=r"config.yaml is damaged"):
            read_former(folder)
        (folder / "done.json").write_text("{}")
        config = OmegaConf.create({"hydra": {}, "seed": 0})
        assert Job("", folder, config).done() is None


def test_what_programs_write_is_read(tmp_path):
    shared = {"a": [1, 2], "b": "a & b, *.tar"}
    written = {"x": shared, "y": shared, "z": [shared["a"]] * 2, "none": None}
    OmegaConf.save(OmegaConf.create(written), tmp_path / "a.yaml")
    assert read_yaml(tmp_path / "a.yaml") == written
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(["a=[&x]", "b='*y'", "&c"]))
    assert read_yaml(tmp_path / "b.yaml") == ["a=[&x]", "b='*y'", "&c"]
    assert read_yaml(tmp_path / "c.yaml") is None
