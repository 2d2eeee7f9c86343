"""Progress in a log file: whole lines, not a bar that is drawn again."""

import re

import pytest
import rich
from lightning.pytorch.callbacks import RichProgressBar

from lightning_modules.loggers.progress import ProgressLines, bar_or_lines

PROGRESS = "{_target_: lightning_modules.loggers.progress.bar_or_lines, every_s: 0.0}"


def test_a_terminal_has_a_bar_and_a_file_has_lines(monkeypatch):
    for terminal, expected in ((True, RichProgressBar), (False, ProgressLines)):
        monkeypatch.setattr(rich.get_console(), "_force_terminal", terminal)
        assert type(bar_or_lines()) is expected
    with pytest.raises(ValueError, match=r"every_s=-1\.0 must be 0 or more seconds"):
        bar_or_lines(every_s=-1.0)


def test_lines_have_step_loss_speed_and_end(run_train, tmp_path, capsys):
    words = [f"callbacks.progress={PROGRESS}", "trainer.enable_progress_bar=null"]
    run_train(tmp_path / "run", *words, "data.training.samples=16")
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.match(r"step \d|test: ", line)]
    assert re.fullmatch(r"step 1 of 4, loss \d\S*", lines[0])
    middle = r"step 2 of 4, loss \d\S*, \S+ steps/s, ends about \w+ \d\d:\d\d:\d\d"
    assert re.fullmatch(middle, lines[1])
    assert re.fullmatch(r"step 4 of 4, loss \d\S*, \S+ steps/s", lines[3])
    assert re.fullmatch(r"step 4: validation, val/loss \d\S*", lines[4])
    assert re.fullmatch(r"test: batch 1 of \d+", lines[5])
    assert "\r" not in out
    assert "\x1b" not in out


def test_few_lines_if_the_steps_are_fast(run_train, tmp_path, capsys):
    words = [f"callbacks.progress={PROGRESS.replace(': 0.0', ': 1000.0')}", "test=false"]
    run_train(tmp_path / "run", *words, "trainer.enable_progress_bar=null")
    found = re.findall(r"^(step \d.*?),", capsys.readouterr().out, re.MULTILINE)
    assert found == ["step 12 of 12", "step 12: validation"]
