"""ropelab-runs: states of run directories, from files of real runs."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from experiments.run import lock
from experiments.run.read import RunState, read_runs
from experiments.run.settings import factors
from experiments.runs import as_age, main, make_table, what_is_missing
from lightning_modules.callbacks.heartbeat import Heartbeat
from lightning_modules.checkpoint.preemption import Preempted, signals


def make_run(
    folder: Path,
    *words: str,
    status: dict | None = None,
    done: dict | None = None,
    rotary: str = "videorope",
) -> Path:
    """Writes the files of `RunDirectory` and `Heartbeat`."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(words)))
    choices = {"rotary": rotary, "hydra/launcher": "basic"}
    hydra = {"hydra": {"runtime": {"choices": choices}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "optim": {"lr": 0.1}}))
    (folder / "run.lock").touch()
    if status is not None:
        beat = {"step": 5, "total_steps": 60, "time": time.time(), "starts": 1, "metrics": {}}
        (folder / "status.json").write_text(json.dumps(beat | status))
    if done is not None:
        (folder / "done.json").write_text(json.dumps({"steps": 60, "metrics": {}} | done))
    return folder


def freeze(folder: Path, *words: str) -> Path:
    """Writes a job as a launcher leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    frozen = {
        "seed": 0,
        "hydra": {"overrides": {"task": list(words)}, "runtime": {"choices": {"rotary": "tad"}}},
    }
    (folder / ".hydra" / "frozen.yaml").write_text(yaml.safe_dump(frozen))
    return folder


@pytest.fixture(name="hold")
def hold_fixture():
    """`hold(folder)` starts a process that holds the lock, like a training there."""
    holders = []

    def act(folder: Path) -> None:
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            lock.take(folder)
            os.write(tell, b"x")
            time.sleep(300)
            os._exit(0)
        os.read(ready, 1)
        holders.append(pid)

    yield act
    for pid in holders:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def states(*roots: Path) -> dict[str, str]:
    return {run.folder.name: run.state for run in read_runs(roots)}


def test_every_state_is_told_apart(tmp_path, hold, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "none")  # from the cluster of other tests
    make_run(tmp_path / "done", status={"state": "trained"}, done={})
    make_run(tmp_path / "running", status={"state": "training"})
    make_run(tmp_path / "stale", status={"state": "training", "time": time.time() - 3600})
    make_run(tmp_path / "starting")
    for name in ("running", "stale", "starting"):
        hold(tmp_path / name)
    make_run(tmp_path / "killed", status={"state": "training"})
    make_run(tmp_path / "preempted", status={"state": "preempted", "reason": "walltime"})
    make_run(tmp_path / "cancelled", status={"state": "cancelled", "reason": "SIGTERM"})
    make_run(tmp_path / "interrupted", status={"state": "stopped", "reason": "Ctrl-C"})
    make_run(tmp_path / "failed", status={"state": "failed", "reason": "ValueError: no shards"})
    make_run(tmp_path / "before_fit")
    (make_run(tmp_path / "damaged") / "done.json").write_text('{"steps": 6')
    freeze(tmp_path / "frozen")
    (freeze(tmp_path / "submitted") / "slurm.json").write_text('{"job_id": "12_3"}')
    runs = read_runs([tmp_path])
    assert {run.folder.name: run.state for run in runs} == {
        "before_fit": "stopped",
        "cancelled": "cancelled",
        "damaged": "damaged",
        "done": "done",
        "failed": "failed",
        "frozen": "not started",
        "interrupted": "stopped",
        "killed": "stopped",
        "preempted": "preempted",
        "running": "running",
        "stale": "stale",
        "starting": "running",
        "submitted": "queued",
    }
    reasons = {run.folder.name: run.reason for run in runs if run.reason}
    assert {name: text for name, text in reasons.items() if name != "damaged"} == {
        "before_fit": "no step",
        "cancelled": "SIGTERM",
        "failed": "ValueError: no shards",
        "interrupted": "Ctrl-C",
        "killed": "killed",
        "preempted": "walltime",
    }


def test_the_queue_is_asked_where_there_is_one(tmp_path, monkeypatch):
    """A preempted job that waits again is queued. A submitted job that was cancelled is not."""
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 12_3\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    runs = tmp_path / "runs"
    waits = make_run(runs / "waits", status={"state": "preempted", "reason": "SIGTERM"})
    (waits / "slurm.json").write_text('{"job_id": "12_3"}')
    (freeze(runs / "cancelled") / "slurm.json").write_text('{"job_id": "12_4"}')
    assert states(runs) == {"waits": "queued", "cancelled": "not started"}


def varied(runs: list[RunState]) -> dict[str, list[str | None]]:
    return factors([run.settings for run in runs])


def test_axes_are_what_differs_whether_said_or_not(tmp_path):
    make_run(tmp_path / "a", "experiment=x", "seed=0", "rotary=tad", "paths.runs=1")
    make_run(tmp_path / "b", "experiment=x", "seed=1", "+optim.lr=0.2", "paths.runs=2")
    freeze(tmp_path / "c", "experiment=x")
    assert varied(read_runs([tmp_path])) == {
        "rotary": ["tad", "videorope", "tad"],
        "optim.lr": ["0.1", "0.2", None],
        "seed": ["0", "1", "0"],
    }


def test_the_last_lines_say_what_a_sweep_lacks(tmp_path):
    make_run(tmp_path / "sweep" / "a", done={})
    make_run(tmp_path / "sweep" / "b", status={"state": "failed"})
    freeze(tmp_path / "sweep" / "c")
    make_run(tmp_path / "whole" / "a", done={})
    make_run(tmp_path / "whole" / "b", done={})
    make_run(tmp_path / "single" / "a", done={})
    assert what_is_missing(read_runs([tmp_path])) == [
        "sweep: 1 of 3 done, 2 to go: the same command runs them",
        "whole: 2 of 2 done",
    ]


def test_the_table_shows_it_and_json_holds_it(tmp_path, capsys):
    beat = {"state": "stopped", "reason": "Ctrl-C", "time": time.time() - 400}
    metrics = {"val/loss": 2.5, "train/loss": 3.0}
    make_run(tmp_path / "a", "rotary=tad", status=beat | {"starts": 3, "metrics": metrics})
    make_run(
        tmp_path / "b", status={"metrics": {"val/loss": 3.5}}, done={"metrics": {"score": 0.5}}
    )
    runs = read_runs([tmp_path])
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(make_table(runs, varied(runs), "val/loss", 140))
    head, first, second = console.export_text().splitlines()
    assert head.split() == ["rotary", "state", "step", "val/loss", "last", "sign", "resumes", "run"]
    assert first.split() == [*["tad", "stopped", "(Ctrl-C)", "5/60", "2.5", "7", "min", "2", "a"]]
    assert second.split() == ["videorope", "done", "60/60", "3.5", "0", "s", "-", "b"]

    assert main([str(tmp_path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], first["step"], first["resumes"]) == ("stopped", 5, 2)
    assert first["axes"] == {"rotary": "tad"}
    assert second["metrics"] == {"val/loss": 3.5, "score": 0.5}

    assert main([str(tmp_path), "--metric", "val/los"]) == 2
    assert "no run has a metric 'val/los'; there are: score, train/loss" in capsys.readouterr().err


def shown(folder: Path, width: int, monkeypatch, capsys) -> list[str]:
    """Returns the lines that ropelab-runs prints in a terminal of this width."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([str(folder)]) == 0
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_sweep_fits_80_columns_with_one_line_a_run(tmp_path, monkeypatch, capsys):
    statuses = [None, {"state": "stopped", "reason": "Ctrl-C"}, {"state": "preempted"}]
    folder = tmp_path / "sweep" / "with-optim.optimizer.lr_0.002-trainer.max_epochs_3"
    made = itertools.product(("mrope", "videorope"), ("average_2x2", "prompt_guided_2x2"), range(3))
    for number, (rotary, pooler, seed) in enumerate(made):
        words = [f"rotary={rotary}", f"pooler={pooler}", f"seed={seed}", "optim.lr=2e-3"]
        name = f"{rotary}-seed{seed}-pooler_{pooler}"
        if number < 9:
            make_run(folder / name, *words, done={"metrics": {"score": 0.5}}, rotary=rotary)
        else:
            freeze(folder / name, *words)
            (folder / name / "config.yaml").touch()
            if status := statuses[number - 9]:
                beat = {"step": 5, "total_steps": 60, "time": time.time(), "metrics": {}}
                (folder / name / "status.json").write_text(json.dumps(beat | status))
    lines = shown(tmp_path, 80, monkeypatch, capsys)
    _, head, *rows, last = lines
    assert max(map(len, lines)) <= 80
    assert head.split() == ["rotary", "pooler", "seed", "state", "step", "score", "last", "sign"]
    assert len(rows) == 12
    cells = ["videorope", "prompt_guided_2x2", "1", "stopped", "(Ctrl-C)", "5/60", "-", "0", "s"]
    assert rows[10].split() == cells
    assert last == ("with-optim.o…ax_epochs_3: 9 of 12 done, 3 to go: the same command runs them")
    wide = shown(tmp_path, 160, monkeypatch, capsys)
    assert wide[1].split()[-1] == "run"
    assert wide[2].endswith("mrope-seed0-pooler_average_2x2")


def test_where_factors_do_not_fit_their_middle_is_cut(tmp_path, monkeypatch, capsys):
    for n in range(3):
        keys = (f"some.key{k}={'x' * 30}{n}" for k in range(4))
        make_run(tmp_path / "sweep" / str(n), *(f"+{key}" for key in keys))
    lines = shown(tmp_path, 80, monkeypatch, capsys)
    assert max(map(len, lines)) <= 80
    assert len(lines) == 2 + 3 + 1
    assert lines[2].split()[0] == "xxxxxx…xxxxx0"
    assert lines[2].split()[4:6] == ["stopped", "(no"]


def test_runs_that_no_factor_tells_apart_have_their_directories(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        make_run(tmp_path / "sweep" / name, "seed=0", status={"state": "failed", "reason": "E: x"})
    lines = shown(tmp_path, 80, monkeypatch, capsys)
    assert [line.split()[0] for line in lines[1:4]] == ["run", "a", "b"]
    missing = "sweep: 0 of 2 done, 2 to go: the same command runs them"
    assert lines[4:] == ["a: failed, E: x", "b: failed, E: x", missing]


class Beating(LightningModule):
    """A module of one parameter, four steps an epoch. It may act in the sixth step."""

    def __init__(self, act=lambda: None):
        super().__init__()
        self.weight, self.act = torch.nn.Parameter(torch.ones(1)), act

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 5:
            self.act()
        self.log("train/loss", self.weight.sum())
        return self.weight.sum()

    def test_step(self, batch, batch_idx):
        self.log("needle/plain", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def beat(folder: Path, act=lambda: None) -> tuple[Trainer, Beating, DataLoader]:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[Heartbeat(folder, every_s=0.0)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return trainer, Beating(act), DataLoader([0.0] * 4)  # pyright: ignore[reportArgumentType]


QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`srun` command is available"),
]


class TestHeartbeat:
    pytestmark = QUIET

    def status(self, folder: Path) -> dict:
        return json.loads((folder / "status.json").read_text())

    def test_a_run_beats_to_its_end(self, tmp_path):
        seen = []
        trainer, module, data = beat(tmp_path, lambda: seen.append(self.status(tmp_path)))
        trainer.fit(module, data)
        (fifth,) = seen
        assert (fifth["state"], fifth["step"], fifth["total_steps"]) == ("training", 5, 8)
        assert time.time() - fifth["time"] < 60
        assert fifth["metrics"].keys() == {"train/loss"}
        assert (self.status(tmp_path)["state"], self.status(tmp_path)["step"]) == ("trained", 8)
        trainer.test(module, data, verbose=False)
        assert self.status(tmp_path)["state"] == "tested"
        assert self.status(tmp_path)["metrics"]["needle/plain"] == 0.5
        assert self.status(tmp_path)["starts"] == 1

    @pytest.mark.parametrize(
        ("error", "state", "reason"),
        [
            (ValueError("no\nshards"), "failed", "ValueError: no"),
            (SystemExit(75), "stopped", "SystemExit: 75"),
            (Preempted("SIGTERM"), "cancelled", "SIGTERM"),
            (Preempted("SIGUSR1"), "preempted", "SIGUSR1"),
            (Preempted("walltime"), "preempted", "walltime"),
            (Preempted("SIGINT"), "stopped", "Ctrl-C"),
        ],
    )
    def test_how_a_run_ended_is_told(self, error, state, reason, tmp_path, monkeypatch):
        for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
            monkeypatch.delenv(name, raising=False)

        def act():
            raise error

        for starts in (1, 2):
            trainer, module, data = beat(tmp_path, act)
            with pytest.raises(type(error)):
                trainer.fit(module, data)
            status = self.status(tmp_path)
            assert (status["state"], status["reason"]) == (state, reason)
            assert (status["step"], status["starts"]) == (5, starts)

    @pytest.mark.parametrize(
        ("shown", "state"), [("RUNNING", "preempted"), ("COMPLETING", "cancelled")]
    )
    def test_slurm_knows_whether_sigterm_came_from_the_user(
        self, shown, state, tmp_path, monkeypatch
    ):
        """W&B's process may be stopped first, and its error come before the step has ended."""
        said = f"JobState={shown} RunTime=00:01:00 TimeLimit=01:00:00"
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setattr(
            "datamodules.common.slurm.scontrol",
            lambda *_: subprocess.CompletedProcess([], 0, said, ""),
        )

        def act():
            monkeypatch.setattr(signals, "received", "SIGTERM")
            raise ConnectionResetError("gone")

        trainer, module, data = beat(tmp_path, act)
        with pytest.raises(ConnectionResetError):
            trainer.fit(module, data)
        status = self.status(tmp_path)
        assert (status["state"], status["reason"]) == (state, "SIGTERM")

    def test_a_start_that_fails_before_training_keeps_what_was_reached(self, tmp_path):
        trainer, module, data = beat(tmp_path)
        trainer.fit(module, data)
        before = self.status(tmp_path)

        def fail(*_):
            raise ValueError("no memory")

        trainer, module, data = beat(tmp_path)
        module.configure_optimizers = fail
        with pytest.raises(ValueError, match="no memory"):
            trainer.fit(module, data)
        after = self.status(tmp_path)
        assert (after["state"], after["reason"]) == ("failed", "ValueError: no memory")
        assert (after["step"], after["total_steps"], after["starts"]) == (8, 8, 1)
        assert after["wall_s"] >= before["wall_s"]

    def test_without_a_disk_training_goes_on(self, tmp_path, caplog):
        trainer, module, data = beat(tmp_path / "no" / "such")
        trainer.fit(module, data)
        assert trainer.global_step == 8
        assert "cannot write the heartbeat" in caplog.text


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_runs_is_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (150, "2 min"), (9000, "2 h"), (1e6, "12 d")]
)
def test_ages(seconds, text):
    assert as_age(seconds) == text


def test_300_runs_are_listed_without_torch(tmp_path):
    """Checks what was imported and opened, not the time."""
    for n in range(300):
        make_run(tmp_path / str(n), f"seed={n}", "rotary=tad", status={"state": "training"})
    lines = [
        "import sys, yaml",
        "from experiments import runs; from experiments.run import settings as read",
        "opened = []",
        "before = read.read_yaml",
        "read.read_yaml = lambda path: (opened.append(path.name), before(path))[1]",
        f"assert runs.main([{str(tmp_path)!r}, '--json']) == 0",
        "heavy = {'torch', 'lightning', 'wandb', 'hydra', 'numpy'} & sys.modules.keys()",
        "print(sorted(heavy), sorted(set(opened)), file=sys.stderr)",
    ]
    root = str(Path(__file__).parents[2])
    shown = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(shown.stdout)) == 300
    assert shown.stderr.strip() == "[] ['hydra.yaml', 'overrides.yaml']"


def test_it_ends_without_a_word_when_its_reader_does(tmp_path):
    for number in range(200):
        make_run(tmp_path / f"run-{number:03}", f"seed={number}")
    words = [sys.executable, "-m", "experiments.runs", str(tmp_path), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout
        assert program.stderr
        assert program.stdout.readline() == b"[\n"
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == (b"", -signal.SIGPIPE)
