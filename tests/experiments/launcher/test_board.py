"""The table of a multirun's jobs while they run."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.conf import HydraConf
from omegaconf import OmegaConf

from experiments.launcher import board as boards
from experiments.launcher.board import Board, Row, as_duration, choose_rows
from experiments.launcher.job import Job
from experiments.launcher.local import last_error
from experiments.launcher.wandb_key import check_key

ROOT = Path(__file__).parents[3]
LIGHT = ROOT / "tests" / "experiments" / "launcher" / "cluster"


def make_job(folder: Path, number: int = 0, **config: object) -> Job:
    (folder / str(number)).mkdir(parents=True, exist_ok=True)
    node = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf), **config})
    return Job(f"#{number} seed={number}", folder / str(number), node)


def beat(job: Job, ago: float, step: int, state: str = "training", loss: float = 2.0) -> None:
    """Writes the files as a run's `Heartbeat` does."""
    status = {
        "state": state,
        "step": step,
        "total_steps": 100,
        "time": time.time() - ago,
        "metrics": {"val/loss": 9.0, "train/loss": loss},
    }
    (job.folder / "status.json").write_text(json.dumps(status))


def texts(row: Row) -> tuple[str, ...]:
    return row.label, row.steps, row.loss, row.time_left


# One job


def test_time_left_goes_by_the_speed_of_this_start(tmp_path):
    """A resumed run, 10 s ago: 20 steps in 40 s, so 2 s per step; at step 70 of 100, 30 to go."""
    row = Row(make_job(tmp_path), "running", since=time.time() - 100)
    assert texts(row) == ("starting", "", "", "")
    beat(row.job, ago=200, step=40)  # from the earlier start
    row.look()
    assert texts(row) == ("starting", "", "", "")
    beat(row.job, ago=50, step=50)
    row.look()
    assert texts(row) == ("training", "50/100", "2", "")
    beat(row.job, ago=10, step=70, loss=1.23456)
    row.look()
    assert texts(row) == ("training", "70/100", "1.235", "50 s")
    beat(row.job, ago=10, step=70, state="validating")
    row.look()
    assert texts(row)[0] == "validating"
    assert texts(row)[3] == "50 s"
    beat(row.job, ago=0, step=100, state="trained")
    row.look()
    assert texts(row) == ("testing", "100/100", "2", "")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"time": "x", "step": 1}', '{"time": 9e99}', '{"step": 3}']
)
def test_a_damaged_sign_of_life_is_none(text, tmp_path):
    row = Row(make_job(tmp_path), "running")
    (row.job.folder / "status.json").write_text(text)
    row.look()
    assert texts(row) == ("starting", "", "", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (119.4, "119 s"), (150, "2 min"), (7199, "2 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, text):
    assert as_duration(seconds) == text


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("starts\nerror: no shards\nwandb: bye\n", "error: no shards"),
        ("error: old\nstarts again\nerror: new\n", "error: new"),
        ("Traceback:\n  File x\nRuntimeError: boom\n\n", "RuntimeError: boom"),
        ("1%\r2%\rerror: at 2%", "error: at 2%"),
        ("x" * 100_000 + "\nerror: far behind\n", "error: far behind"),
        ("error: " + "y" * 300, "error: " + "y" * 193),
        ("\n", None),
    ],
)
def test_the_line_that_says_why_a_job_failed(log, line, tmp_path):
    path = tmp_path / "stdout.log"
    path.write_text(log)
    assert last_error(path) == line
    assert last_error(tmp_path / "none") is None


# All jobs


def test_jobs_that_run_stand_first_where_there_is_no_room():
    states = ["finished", "waiting", "training", "failed", "waiting", "running"]
    rows = [Row(None, state) for state in states]  # pyright: ignore[reportArgumentType]
    chosen, hidden = choose_rows(rows, 3)
    assert [row.state for row in chosen] == ["training", "failed", "running"]
    assert [row.state for row in hidden] == ["finished", "waiting", "waiting"]
    assert choose_rows(rows, 0)[0] == [rows[2]]
    assert choose_rows(rows, 6) == (rows, [])


def test_a_log_gets_a_line_at_each_change_and_one_now_and_then(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(boards, "_TABLE_S", 0.0)
    jobs = [make_job(tmp_path, number) for number in range(2)]
    with Board(jobs) as board:
        board.set(jobs[0], "running")
        board.refresh()
        assert not caplog.messages  # the launcher has logged the start
        beat(jobs[0], ago=-1, step=1)
        for _ in range(3):
            board.refresh()
        assert caplog.messages == ["#0 seed=0: training, 1/100 steps, loss 2"]
        beat(jobs[0], ago=-2, step=2)
        board.refresh()
        assert len(caplog.messages) == 1
        board._next_lines = 0.0
        board.refresh()
        assert caplog.messages[1].startswith("#0 seed=0: training, 2/100 steps, loss 2, ")
        board.refresh()
        board.set(jobs[0], "finished")
        board.refresh()
    assert len(caplog.messages) == 2


# In a terminal


def in_terminal(command: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    """Returns exit code and output of a program in a terminal where nobody types."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        path = f"{ROOT}{os.pathsep}{LIGHT}"
        os.execve(
            command[0], command, os.environ | {"PYTHONPATH": path, "TERM": "xterm"} | environment
        )
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


@pytest.mark.parametrize("trainer", [[], ["+trainer.accelerator=cpu"]], ids=["alone", "forked"])
def test_a_table_in_a_terminal_and_jobs_that_have_none(trainer, tmp_path):
    configs = str(LIGHT / "configs")
    command = [sys.executable, "-m", "light", "--config-dir", configs, "-m", "run_name=${seed}"]
    command += [
        "launcher=local_parallel",
        "hydra.launcher.n_jobs=2",
        "seed=0,1",
        "fails=[1]",
        *trainer,
    ]
    code, shown = in_terminal(command, tmp_path, COLUMNS="120", LINES="20")
    assert code == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)  # colours and cursor movements
    assert re.search(r"job +state +step +loss +time left", shown)
    assert re.search(r"#0 seed=0 +finished +score 0", shown)
    assert re.search(r"#1 seed=1 +failed +exit code 1 \(error: asked to fail\)", shown)
    for seed in (0, 1):
        (start,) = (
            (tmp_path / "runs" / "light" / str(seed) / "starts.jsonl").read_text().splitlines()
        )
        assert json.loads(start)["terminal"] is False
    one = [word for word in command if not word.startswith(("launcher=", "hydra.launcher"))]
    code, shown = in_terminal([*one, "resume=false"], tmp_path)
    assert "counted 3" in shown
    assert "state" not in shown
    starts = (tmp_path / "runs" / "light" / "0" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["terminal"] for start in starts] == [False, False]


def test_only_in_the_foreground_a_run_can_ask(tmp_path):
    ask = "from experiments.start import leave_terminal_to_the_foreground as leave; leave(); "
    python = f"{sys.executable} -c '{ask} import sys; print(f\"asks: {{sys.stdin.isatty()}}\")'"
    _, shown = in_terminal(["/bin/bash", "-c", f"set -m; {python}; {python} & wait"], tmp_path)
    assert re.findall("asks: (True|False)", shown) == ["True", "False"]


# The key of W&B

KEY = "0" * 40


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder without a key."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def online(folder: Path, mode: str | None = "online") -> list[Job]:
    target = "lightning_modules.loggers.wandb.ResumableWandbLogger"
    return [make_job(folder, logger={"csv": None, "wandb": {"_target_": target, "mode": mode}})]


@pytest.mark.parametrize("mode", ["online", None])
def test_without_a_key_no_job_starts(mode, home):
    with pytest.raises(ValueError, match=r"W&B has no key .*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_key(online(home, mode))


def test_a_key_is_found_where_wandb_looks_for_it(home, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    netrc = home / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    with pytest.raises(ValueError, match="W&B has no key"):  # of another server
        check_key(online(home))
    netrc.write_text(f"machine wandb.example.com login user password {KEY}\n")
    check_key(online(home))
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match=r"W&B has no key .WANDB_API_KEY invalid: .*40"):
        check_key(online(home))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_key(online(home))


def test_nobody_needs_a_key_offline(home, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked"))
    check_key([*online(home, "offline"), *online(home, "disabled"), make_job(home, 1)])
    check_key([make_job(home, 2, logger={"csv": {"_target_": "x.CSVLogger"}})])
