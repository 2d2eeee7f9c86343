"""One W&B run per run directory: after kills, with resumes, and without a server."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import wandb.sdk.launch  # by every `init`: a second that each forked child would take again
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.loggers.csv import ResumableCSVLogger
from lightning_modules.loggers.wandb import ResumableWandbLogger, finish_wandb
from tests.helpers.wandb_files import find_fragments, read_rows
from tests.helpers.wandb_server import WandbServer

STEPS = 20
CHECKPOINT_EVERY = 5

#: Values that depend on the clock, on the process, or on the place of a file.
VOLATILE = ("_runtime", "_timestamp", "artifact_path", ".path", ".filenames")


def in_child(act: Callable[[], None]) -> int:
    """Runs `act` in a forked process, which may kill itself. Returns its exit status or -signal."""
    wandb.teardown()  # leftovers of other tests do not survive a fork
    time.sleep(1.0 - time.time() % 1.0)  # W&B names its folders by the second
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            warnings.simplefilter("default")
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            wandb.teardown()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def make_logger(folder: Path) -> ResumableWandbLogger:
    return ResumableWandbLogger(
        save_dir=folder,
        project="p",
        best={"val/loss": "min"},
        init_timeout=5,
        finish_timeout=5,
        mode=os.environ["WANDB_MODE"],
    )


def train(
    folder: Path,
    start: int = 0,
    *,
    die_at: tuple[int, str] | None = None,
    pause: float = 0.0,
    before: Callable[[int], None] = lambda step: None,
    **ending: Any,
) -> None:
    """Logs like a training that starts at `start`. It dies after the named part of a step."""
    logger = make_logger(folder)
    loggers = [ResumableCSVLogger(folder), logger]
    for each in loggers:
        each.log_hyperparams({"model": {"rotary": {"theta": 10000.0}}, "choice": {"seed": 0}})

    def reach(step: int, part: str) -> None:
        if die_at == (step, part):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(start, STEPS):
        before(step)
        for name, metrics in parts_of(step).items():
            for each in loggers:
                each.log_metrics(metrics, step)
            reach(step, name)
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            table = {"columns": ["step", "text"], "data": [[step, "a"]]}
            logger.log_table("val/generations", **table, step=step)
            reach(step, "table")
    finish_wandb(**{"exit_code": 0, **ending})


def parts_of(step: int) -> dict[str, dict[str, float]]:
    """Yields the rows of a step, in turn."""
    parts = {
        "rate": {"lr-AdamW": 1e-3 / (step + 1)},
        "loss": {"train/loss": math.nan if step == 3 else 1 / (step + 1), "epoch": step // 10},
    }
    if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
        parts["val"] = {"val/loss": abs(step - 9.0), "epoch": step // 10}
    return parts


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in values.items() if not k.endswith(VOLATILE)}
    return {k: "NaN" if v != v else v for k, v in kept.items()}


def rows_on_disk(folder: Path) -> list[dict[str, Any]]:
    run_id = (folder / "run_id").read_text()
    rows = {row["_step"]: lasting(row) for row in read_rows(find_fragments(folder, run_id))}
    return [rows[step] for step in sorted(rows)]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the server has received, in the form of `rows_on_disk`."""
    values = {}
    for key, value in row.items():
        nested = isinstance(value, dict)
        values |= {f"{key}.{k}": v for k, v in value.items()} if nested else {key: value}
    return lasting(values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Returns the rows of a training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_child(lambda: train(folder)) == 0
    rows = rows_on_disk(folder)
    assert [row["_step"] for row in rows] == list(range(2 * STEPS + 2 * STEPS // CHECKPOINT_EVERY))
    return rows


def test_kills_leave_the_rows_of_an_undisturbed_run(whole, tmp_path):
    """Some kills come so early that W&B has written nothing."""
    cuts = [(0, (7, "rate"), 0.0), (5, (9, "table"), 0.0), (10, (13, "loss"), 0.5)]
    for start, die_at, pause in cuts:
        act = partial(train, tmp_path, start, die_at=die_at, pause=pause)
        assert in_child(act) == -signal.SIGKILL
    assert in_child(lambda: train(tmp_path, 10)) == 0
    assert rows_on_disk(tmp_path) == whole
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == len(cuts) + 1


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_online_the_server_receives_every_row_once(server, whole, tmp_path):
    """A kill comes long before an upload: the resumed run sends those rows."""
    assert in_child(partial(train, tmp_path, 0, die_at=(7, "loss"), pause=0.5)) == -signal.SIGKILL
    assert in_child(partial(train, tmp_path, 5, die_at=(13, "loss"), pause=0.5)) == -signal.SIGKILL
    assert in_child(partial(train, tmp_path, 10, exit_code=75, preempted=True)) == 0
    (run_id,) = server.runs
    assert run_id == (tmp_path / "run_id").read_text()
    run = server.runs[run_id]
    assert [flat(row) for row in run.rows] == whole
    assert run.overwritten == 0
    assert run.events == ["preempting", "exit 75"]
    assert run.config["model"]["value"] == {"rotary": {"theta": 10000.0}}
    assert run.config["choice"]["value"] == {"seed": 0}
    assert run.summary["val/loss"] == {"min": 0}
    assert run.summary["val/generations"]["nrows"] == 1
    assert server.unknown == []
    tables = [body for name, body in server.files.items() if name.endswith(".table.json")]
    assert {json.loads(body)["data"][0][0] for body in tables} == {4, 9, 14, 19}


def sync(folder: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", str(folder / "wandb" / "latest-run")]
    synced = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert synced.returncode == 0, synced.stderr


@pytest.mark.parametrize("often", [False, True])
def test_offline_the_newest_start_holds_the_run(often, server, whole, tmp_path, monkeypatch):
    """A sync after each start sends some rows twice. They are equal at the same step."""
    act = partial(train, tmp_path)
    for ending in (partial(act, die_at=(13, "loss"), pause=0.5), partial(act, 10)):
        monkeypatch.setenv("WANDB_MODE", "offline")
        in_child(ending)
        monkeypatch.setenv("WANDB_MODE", "online")
        if often or ending.args[1:]:
            sync(tmp_path)
    (run,) = server.runs.values()
    received = [flat(row) for row in run.rows]
    assert all(row == whole[row["_step"]] for row in received)
    assert {row["_step"] for row in received} == {row["_step"] for row in whole}
    assert often or len(received) == len(whole)
    assert run.config["choice"]["value"] == {"seed": 0}


def test_an_end_that_is_reached_again_is_summed_up_anew(server, tmp_path):
    """A finished run is tested again with other lengths: one row, with the newer number on top."""

    def log_end(score: float) -> None:
        logger = make_logger(tmp_path)
        logger.log_metrics({"needle/plain": score}, 12)
        logger.log_metrics({"val/loss": score}, 12)
        finish_wandb(0)

    for score in (0.25, 0.75):
        assert in_child(partial(log_end, score)) == 0
    (run,) = server.runs.values()
    first, second = run.rows
    assert (first["needle/plain"], second["val/loss"]) == (0.25, 0.25)
    assert run.summary["needle/plain"] == 0.75
    assert run.summary["val/loss"] == {"min": 0.25}


@pytest.mark.slow  # for 20 s of these, W&B waits for an answer to a table
def test_a_server_that_goes_away_stops_no_run(server, whole, tmp_path):
    """A table waits until the server is back. The resumed run sends the rows that it missed."""

    def tell(word: str) -> None:
        urllib.request.urlopen(f"{server.url}/control/{word}", data=b"{}").close()

    def before(step: int) -> None:
        if step == 8:
            time.sleep(1)
        if step in (8, 16):
            tell("down")
        if step == 11:
            tell("up")

    began = time.monotonic()
    assert in_child(partial(train, tmp_path, before=before, die_at=(18, "loss"))) == -9
    assert time.monotonic() - began < 90
    tell("up")
    (run,) = server.runs.values()
    assert len(run.rows) < len(whole)
    assert in_child(partial(train, tmp_path, 15)) == 0
    received = [flat(row) for row in run.rows]
    assert [row.pop("_step") for row in received] == list(range(len(whole)))
    expected = [{k: v for k, v in row.items() if k != "_step"} for row in whole]
    by_step = partial(sorted, key=lambda row: (row["trainer/global_step"], sorted(row)))
    assert by_step(received) == by_step(expected)


def test_a_server_that_is_not_there_leaves_the_run_offline_until_it_is(server, whole, tmp_path):
    server.down = True
    assert in_child(partial(train, tmp_path, die_at=(13, "loss"), pause=0.5)) == -signal.SIGKILL
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert not server.runs
    server.down = False
    assert in_child(partial(train, tmp_path, 10)) == 0
    (run,) = server.runs.values()
    assert [flat(row) for row in run.rows] == whole


def test_a_run_without_a_key_is_one_line(server, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def begin() -> None:
        with pytest.raises(ValueError, match=r"WANDB_API_KEY.*WANDB_MODE=offline") as caught:
            make_logger(tmp_path).log_metrics({"a": 1.0}, 0)
        assert "\n" not in str(caught.value)

    assert in_child(begin) == 0


def test_an_image_that_a_kill_may_have_lost_is_logged_again(tmp_path):
    """The journal does not hold it. A test that is repeated makes it anew."""

    def log() -> None:
        logger = make_logger(tmp_path)
        logger.log_image("needle/heatmap", [np.zeros((4, 4, 3), np.uint8)], step=12)
        logger.log_metrics({"needle/plain": 0.5}, 12)
        finish_wandb(0)

    for _ in range(2):
        assert in_child(log) == 0
    (_, second) = find_fragments(tmp_path, (tmp_path / "run_id").read_text())
    rows = list(read_rows([second]))
    assert [row.get("needle/plain") for row in rows] == [None, 0.5, None]
    assert "needle/heatmap._type" in rows[-1]


def test_other_ranks_log_nothing(server, monkeypatch, tmp_path):
    def act(rank: int) -> None:
        rank_zero_only.rank = rank
        logger = make_logger(tmp_path)
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"b": 2.0}, 0)
        logger.log_table("c", columns=["d"], data=[[rank]], step=0)
        finish_wandb(0)

    for rank in (1, 0):
        assert in_child(partial(act, rank)) == 0
    (run,) = server.runs.values()
    assert len(run.rows) == 2
    assert [row["trainer/global_step"] for row in run.rows] == [0, 0]


#: Logs, sends a signal to W&B's own process as a scheduler does, logs again, and ends.
SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from lightning_modules.checkpoint.preemption import signals
from lightning_modules.loggers.wandb import ResumableWandbLogger, finish_wandb

logger = ResumableWandbLogger(save_dir=sys.argv[1], project="p", mode="offline")
logger.log_metrics({"a": 1.0}, step=0)
me = os.getpid()
names = {int(p.parent.name): p.read_text().split() for p in Path("/proc").glob("[0-9]*/stat")}
(core,) = [pid for pid, stat in names.items() if "wandb-core" in stat[1] and int(stat[3]) == me]
signals.received = sys.argv[2]
os.kill(core, signal.Signals[sys.argv[2]])
time.sleep(1)
state = Path(f"/proc/{core}/stat").read_text().split()[2]
logger.log_metrics({"a": 2.0}, step=1)
logger.finalize("failed")
finish_wandb(75, preempted=True)
finish_wandb(75)
print("gone" if state == "Z" else "lives")
"""


@pytest.mark.parametrize(("name", "core"), [("SIGTERM", "gone"), ("SIGUSR1", "lives")])
def test_a_run_ends_quietly_if_w_and_b_gets_the_signal_too(name, core, tmp_path):
    root = Path(__file__).parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(tmp_path), name],
        env=os.environ | {"PYTHONPATH": str(root), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == core
    said = [line for line in ended.stderr.splitlines() if not line.startswith("wandb: ")]
    assert said == []
    rows = [json.loads(line) for line in (tmp_path / "logged.jsonl").read_text().splitlines()]
    assert len(rows) == 2  # the resumed run sends the second one
