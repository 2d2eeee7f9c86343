"""The files that loggers write: the journal of W&B's rows, and `metrics.csv`."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_modules.loggers.csv import ResumableCSVLogger
from lightning_modules.loggers.journal import Journal, Row


def test_a_torn_row_of_the_journal_is_no_row(tmp_path):
    journal = Journal(tmp_path)
    rows = [
        Row(0, 1.5, {"train/loss": 0.25}),
        Row(0, 2.0, tables={"t": {"columns": ["a"], "data": [["b\n"]]}}, others=["image"]),
        Row(None, 3.0, {"a": 1.0}),
    ]
    assert list(journal.read()) == []
    for row in rows[:2]:
        journal.append(row)
    path = tmp_path / "logged.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 1, "ti')
    assert list(journal.read()) == rows[:2]
    journal.append(rows[2])
    assert list(journal.read()) == rows
    assert [list(row.restored()) for row in rows] == [["train/loss"], ["t"], ["a"]]


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_new_metrics_get_a_column_and_keep_the_rows(tmp_path):
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"b": torch.tensor(0.5), "epoch": 0}, 1)
    logger.log_metrics({"a": 2.0}, 2)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "a,b,epoch,step"
    assert read(tmp_path) == [{"b": "0.5", "epoch": "0", "step": "1"}, {"a": "2.0", "step": "2"}]


@pytest.mark.parametrize(
    ("metrics", "step", "kept"),
    [({"train": 9.0}, 2, 2), ({"val": 9.0}, 2, 4), ({"train": 9.0}, 3, 5), ({"val": 9.0}, 1, 2)],
)
def test_a_resumed_run_replaces_what_it_repeats(metrics, step, kept, tmp_path):
    """Rows: train 0, train 1, train 2, other 2, val 2."""
    logger = ResumableCSVLogger(tmp_path)
    for at in range(3):
        logger.log_metrics({"train": float(at)}, at)
    logger.log_metrics({"other": 1.0}, 2)
    logger.log_metrics({"val": 1.0}, 2)
    before = read(tmp_path)
    ResumableCSVLogger(tmp_path).log_metrics(metrics, step)
    (name,) = metrics
    assert read(tmp_path) == [*before[:kept], {name: "9.0", "step": str(step)}]
