"""Bars of other packages: drawn on a terminal, absent from files."""

import pytest
from transformers.utils import logging

from experiments.console import bars


@pytest.fixture(autouse=True)
def _bars_as_before():
    logging.enable_progress_bar()  # a program that ran before in this process turned them off
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_on_a_terminal_only(terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    bars.no_bars_in_files()
    list(logging.tqdm(range(3), desc="loading"))
    assert ("loading" in capsys.readouterr().err) == terminal
