"""Jobs that are forked from a template, and that they are what a process of their own would be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.launcher.warm import forks
from experiments.launcher.warm.forks import LOST, ForkedJob, Template, start_process
from tests.helpers.light_runs import until

ROOT = Path(__file__).parents[3]

#: What a job can see of itself. It ends as its first argument says.
PROBE = """
import faulthandler, json, os, random, signal, sys, threading, time, warnings
import numpy
import early
JOB_IMPORTS = ["early"]

def end(how, number="0"):
    if how == "exit":
        sys.exit(int(number))
    if how == "error":
        sys.exit("error: asked to fail")
    if how == "raise":
        raise LookupError("asked to raise")
    if how == "signal":
        os.kill(os.getpid(), int(number))
    if how == "wait":
        print("waits", flush=True)
        time.sleep(60)

if __name__ == "__main__":
    print("early exists:", os.path.isdir(early.FOLDER.name), flush=True)
    seen = {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "main": [__name__, __spec__.name, __file__, sys.modules["__main__"].__dict__ is globals()],
        "imported": "probe" in sys.modules,
        "handlers": {s.name: repr(signal.getsignal(s)).split(" at ")[0] for s in signal.Signals},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "filters": repr(warnings.filters),
        "faulthandler": faulthandler.is_enabled(),
        "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "session": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
        "files": {file: os.path.exists(f"/proc/self/fd/{file}") for file in range(3, 64)},
        "stdin": os.readlink("/proc/self/fd/0"),
        "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding],
        "threads": threading.active_count(),
        "folder": os.getcwd(),
        "umask": os.umask(0o22),
    }
    drawn = [random.random(), numpy.random.rand(), early.FOLDER.name]
    print(json.dumps([seen, drawn]), flush=True)
    end(*sys.argv[1:])
"""
EARLY = """
import tempfile
FOLDER = tempfile.TemporaryDirectory()
print("said while it was imported")
"""
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with the programs, which is the current one."""
    folder, before = tmp_path_factory.mktemp("probe"), Path.cwd()
    (folder / "probe.py").write_text(PROBE)
    (folder / "early.py").write_text(EARLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        os.chdir(folder)
        yield folder
        os.chdir(before)


@pytest.fixture(scope="module")
def template(folder) -> Iterator[Template]:
    template = Template("probe", VARIABLES)
    yield template
    template.close()


@pytest.fixture
def fresh(folder) -> Iterator[Callable[..., Template]]:
    made = []

    def make(program: str = "probe") -> Template:
        made.append(Template(program, VARIABLES))
        return made[-1]

    yield make
    for each in made:
        each.close()


Started = subprocess.Popen | ForkedJob


@pytest.fixture
def begin(folder) -> Callable[..., tuple[Started, Path]]:
    """`begin(start, *arguments)`: a job, and the file that it prints to."""

    def begin(start: Callable[..., Started], *arguments: str) -> tuple[Started, Path]:
        log = folder / f"{time.monotonic_ns()}.log"
        with log.open("a") as output:
            command = [sys.executable, "-m", "probe", *arguments]
            return start(command, VARIABLES | {"OWN": "1"}, output), log

    return begin


def wait(job: Started) -> int:
    until(lambda: job.poll() is not None)
    assert job.returncode is not None
    return job.returncode


def waits(job: Started, log: Path) -> None:
    """Returns when the job has printed `waits`."""
    until(lambda: job.poll() is None and "waits" in log.read_text())


def gone(pid: int | None) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_forked_job_sees_what_a_process_of_its_own_sees(template, begin):
    seen, drawn = [], []
    for start in (template.start, template.start, start_process):
        job, log = begin(start, "exit", "0")
        assert wait(job) == 0
        lines = log.read_text().splitlines()
        assert sorted(lines[:2]) == ["early exists: True", "said while it was imported"]
        one, other = json.loads(lines[2])
        seen.append(one)
        drawn.append(other)
    for name, value in seen[2].items():
        assert [seen[0][name], seen[1][name]] == [value, value], name
    assert seen[0]["environment"]["OWN"] == "1"
    assert all(len(set(column)) == 3 for column in zip(*drawn, strict=True))
    assert not any(Path(folder).exists() for *_, folder in drawn)


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        (("exit", "0"), 0, None),
        (("exit", "75"), 75, None),
        (("error",), 1, "error: asked to fail"),
        (("raise",), 1, "LookupError: asked to raise"),
        (("signal", str(int(signal.SIGKILL))), -signal.SIGKILL, None),
        (("signal", str(int(signal.SIGINT))), -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_exit_codes_are_those_of_a_process(words, code, last, template, begin):
    for start in (template.start, start_process):
        job, log = begin(start, *words)
        assert wait(job) == code
        assert last is None or log.read_text().splitlines()[-1] == last


def test_a_signal_reaches_a_job_and_leaves_no_zombie(template, begin):
    job, log = begin(template.start, "wait")
    waits(job, log)
    job.send_signal(signal.SIGTERM)
    assert wait(job) == -signal.SIGTERM
    assert gone(job.pid)
    job.send_signal(signal.SIGTERM)  # nobody is there


def test_a_signal_right_behind_the_request_is_not_lost(template, begin):
    job, _ = begin(template.start, "wait")
    job.send_signal(signal.SIGKILL)
    assert wait(job) == -signal.SIGKILL


def test_all_of_a_job_is_killed(template, begin):
    job, _ = begin(template.start, "wait")
    forks.kill_session(job)
    assert wait(job) == -signal.SIGKILL
    forks.kill_session(job)


def test_files_are_closed_when_a_job_has_started(template, begin):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        wait(begin(template.start, "exit", "0")[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_pytorch_takes_the_threads_of_the_job(folder, begin, fresh):
    """It reads OMP_NUM_THREADS when it is imported, which is before the fork."""
    text = "import torch\nif __name__ == '__main__': print(torch.get_num_threads())"
    (folder / "count.py").write_text(text)
    job, log = begin(fresh("count").start)
    assert wait(job) == 0
    assert log.read_text() == "1\n"


# Templates that end early


def test_a_job_outlives_its_template(fresh, begin, caplog):
    """Nobody knows its exit code then. What was not forked yet is started as a process."""
    template = fresh()
    job, log = begin(template.start, "wait")
    waits(job, log)
    os.kill(template._process.pid, signal.SIGKILL)
    late, _ = begin(template.start, "exit", "3")
    assert wait(late) == 3
    assert template.ended
    assert "the template of the jobs has ended, exit code -9" in caplog.text
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert wait(job) == LOST


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('no such thing')", "ImportError: no such thing"),
        (
            "from threading import Event, Thread\nThread(target=Event().wait, daemon=True).start()",
            "RuntimeError: an import has started a thread",
        ),
    ],
)
def test_what_cannot_be_forked_is_started(text, reason, folder, fresh, begin, caplog):
    (folder / "bad.py").write_text("JOB_IMPORTS = ['worse']")
    (folder / "worse.py").write_text(text)
    template = fresh("bad")
    job, _ = begin(template.start, "exit", "3")
    assert wait(job) == 3
    assert reason in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 75)])
def test_a_job_that_waits_for_the_imports_never_starts_after_a_signal(
    number, code, folder, fresh, begin
):
    (folder / "slow.py").write_text("import time\ntime.sleep(60)")
    template = fresh("slow")
    job, log = begin(template.start, "exit", "0")
    job.send_signal(number)
    assert job.poll() == code
    assert not template.ready
    assert log.read_text() == ""
    template.close()
    assert gone(template._process.pid)
