"""Shows the progress of the jobs of a multirun: a live table, or lines in a log."""

import json
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.launcher.job import Job

logger = logging.getLogger(__name__)

_TABLE_S, _LINES_S = 1.0, 30.0  # seconds between updates, in a terminal and in a log

#: Metrics to show as the loss. The first one that a job has logged is used.
_LOSSES = ("train/loss", "val/loss")

_COLOURS = {"finished": "green", "failed": "red", "stopped": "yellow", "waiting": "dim"}

#: Labels for the states that a live run writes to `status.json` after its training.
_AFTER_TRAINING = {"trained": "testing", "tested": "ending"}

#: Order in which jobs fill the rows of the table that running jobs leave free.
_FIRST = ("failed", "stopped", "waiting", "finished")


@dataclass
class Row:
    """One job of the table.

    `state` comes from the launcher: `waiting`, `running`, `stopping`, `stopped`, `finished`,
    `failed`, or a state of the batch system. `note` has details.
    """

    job: Job
    state: str = "waiting"
    note: str = ""
    since: float = 0.0  # start time, in seconds since 1970
    shown: str = ""  # its label in the last logged line
    first: tuple[float, int] | None = None  # time and step of its first heartbeat after `since`
    status: dict[str, Any] | None = None  # its last heartbeat

    def look(self) -> None:
        """Reads the job's last heartbeat. Ignores a heartbeat of an earlier start."""
        status = _read(self.job.folder / "status.json")
        if not all(isinstance(status.get(name), (int, float)) for name in ("time", "step")):
            return
        if status["time"] >= self.since:
            self.status = status
            if self.first is None and status.get("state") == "training":
                self.first = status["time"], status["step"]

    @property
    def label(self) -> str:
        if self.state != "running":
            return self.state
        said = str((self.status or {}).get("state", "starting"))
        return _AFTER_TRAINING.get(said, said)

    @property
    def steps(self) -> str:
        if self.status is None:
            return ""
        total = self.status.get("total_steps")
        return f"{self.status['step']}/{total}" if total else str(self.status["step"])

    @property
    def loss(self) -> str:
        metrics = (self.status or {}).get("metrics") or {}
        return next((f"{metrics[name]:.4g}" for name in _LOSSES if name in metrics), "")

    @property
    def time_left(self) -> str:
        """Time until the training ends, at the speed since this start of the run."""
        if (
            self.first is None
            or self.status is None
            or self.label not in ("training", "validating")
        ):
            return ""
        began, at = self.first
        step, total = self.status["step"], self.status.get("total_steps")
        if not total or step <= at:
            return ""
        pace = (self.status["time"] - began) / (step - at)
        return as_duration((total - step) * pace - (time.time() - self.status["time"]))


class Board:
    """Reads the run directories of `jobs` at intervals and shows their progress.

    Use it as a context manager, and call `refresh` often. In a terminal, a table stays below the
    log lines. Elsewhere, a line is logged when the state of a job changes, and one for each running
    job every 30 seconds.

    Args:
        jobs: the jobs to show.
        shown: whether to show anything.
    """

    def __init__(self, jobs: list[Job], shown: bool = True):
        self.rows = {job: Row(job) for job in jobs}
        self._shown, self._next = shown, 0.0
        self._next_lines = time.monotonic() + _LINES_S
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []

    def set(self, job: Job, state: str, note: str = "") -> None:
        """Sets the state of a job."""
        row = self.rows[job]
        if state == "running" and row.state != "running":
            row.since, row.first, row.status = time.time(), None, None
            if note:
                row.since = 0.0
        row.state, row.note = state, note
        if state in ("finished", "stopped", "failed"):
            row.look()
            row.note = note or _score(job)
        self._next = 0.0

    def refresh(self) -> None:
        """Updates the table or logs lines, if it is time to."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _TABLE_S
        for row in self.rows.values():
            if row.state in ("running", "stopping"):
                row.look()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._log_lines()

    def __enter__(self) -> "Board":
        console = Console(file=sys.stdout)
        if self._shown and sys.stdout.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
            streams = (sys.stdout, sys.stderr)
            self._live.start()
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                    self._redirected.append((handler, handler.stream))
                    handler.setStream(sys.stdout)  # rich's stream, which writes above the table
        return self

    def __exit__(self, *_: object) -> None:
        self._next = 0.0
        self.refresh()
        if self._live is not None:
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._live.stop()

    def _table(self) -> Table:
        assert self._live is not None
        rows, hidden = choose_rows(list(self.rows.values()), self._live.console.height - 5)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("job", overflow="ellipsis", no_wrap=True, max_width=60)
        table.add_column("state", no_wrap=True)
        for name in ("step", "loss", "time left"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", overflow="ellipsis", no_wrap=True, style="dim")
        for row in rows:
            state = Text(row.label, style=_COLOURS.get(row.label, "cyan"))
            cells = (row.job.name, state, row.steps, row.loss, row.time_left, row.note)
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
        if hidden:
            counts = Counter(row.label for row in hidden)
            more = ", ".join(f"{count} {label}" for label, count in counts.items())
            table.caption, table.caption_justify = f"and {more}", "left"
        return table

    def _log_lines(self) -> None:
        due = time.monotonic() >= self._next_lines
        if due:
            self._next_lines = time.monotonic() + _LINES_S
        for row in self.rows.values():
            if row.state not in ("running", "stopping"):
                continue  # the launcher logs these itself
            if row.label == row.shown and not due:
                continue
            row.shown = row.label
            if row.status is not None:
                logger.info("%s: %s", row.job.name, describe(row))


def describe(row: Row) -> str:
    """Returns one line about a running job, without its name."""
    parts = [f"{row.label}, {row.steps} steps"]
    parts += [f"loss {row.loss}"] if row.loss else []
    parts += [f"{row.time_left} left"] if row.time_left else []
    return ", ".join(parts)


def choose_rows(rows: list[Row], room: int) -> tuple[list[Row], list[Row]]:
    """Returns (shown rows, hidden rows), each in the given order. Running jobs are shown first.

    At most `room` rows are shown, but at least one.
    """
    order = sorted(rows, key=lambda row: _FIRST.index(row.label) if row.label in _FIRST else -1)
    chosen = set(map(id, order[: max(1, room)]))
    return (
        [row for row in rows if id(row) in chosen],
        [row for row in rows if id(row) not in chosen],
    )


def as_duration(seconds: float) -> str:
    """Returns a duration as text: `42 s`, `17 min` or `2 h 05 min`."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _score(job: Job) -> str:
    metrics = _read(job.folder / "done.json").get("metrics", {})
    return f"score {metrics['score']:.4g}" if "score" in metrics else ""


def _read(path: Path) -> dict[str, Any]:
    """Reads a small JSON file. The result is empty if the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
