"""What a training says at its start, and a finished or resumed one."""

import json
import re

import pytest

from experiments.console.opening import duration, last_step, resumed, short

SHORT = ["data.training.samples=8", "test=false"]


def test_a_training_says_what_it_is_and_ends_with_its_results(run_train, tmp_path, capsys):
    run_train(tmp_path / "run", *SHORT)
    first = capsys.readouterr().out
    assert "training videorope-seed0" in first
    assert re.search(r"llm +tiny: \S+ K parameters, 2 layers of width 64\n", first)
    assert re.search(r"parameters +\S+ K of \S+ K are trained \(tuning=full\)\n", first)
    assert re.search(r"data +vniah: 8 samples an epoch\n", first)
    assert re.search(r"step +4 samples: 1 batch of 4\n", first)
    assert re.search(r"length +2 steps, at most 1 epoch\n", first)
    assert "_target_" not in first
    results = first[first.index("\nresults of") :]
    assert "train/loss" in results
    assert "ropelab-evaluate run=" in results
    run_train(tmp_path / "run", *SHORT)
    again = capsys.readouterr().out
    assert again == f"already finished: {tmp_path / 'run' / 'done.json'}\n{results}"


def test_all_settings_are_printed_only_when_asked_for(run_train, tmp_path, capsys):
    run_train(tmp_path / "run", *SHORT, "print_config=true")
    assert "_target_: torch.optim.AdamW" in capsys.readouterr().out


def test_a_resume_says_where_it_goes_on(run_train, tmp_path, capsys):
    every = "callbacks.checkpoint.every_n_steps=100"
    run_train(tmp_path / "run", *SHORT, every)
    (tmp_path / "run" / "done.json").unlink()
    run_train(tmp_path / "run", *SHORT, every, "trainer.max_epochs=2")
    assert "goes on from step 2 of 4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reached", "exact", "line"),
    [
        (47, True, "goes on from step 40 of 120; steps 41 to 47 are taken again"),
        (41, True, "goes on from step 40 of 120; step 41 is taken again"),
        (40, True, "goes on from step 40 of 120"),
        (
            47,
            False,
            "goes on from step 40 of 120; steps 41 to 47 are taken again, and any that were not "
            "logged",
        ),
        (0, False, "goes on from step 40 of 120; steps that were not logged are taken again"),
    ],
)
def test_the_line_of_a_resume(reached, exact, line):
    assert resumed(40, 120, reached, exact) == line


def test_a_training_without_an_end():
    assert resumed(40, float("inf"), 40, True) == "goes on from step 40"


@pytest.mark.parametrize(
    ("state", "logged", "found"),
    [
        ("stopped", [4, 9], (12, True)),
        ("training", [4, 9], (12, False)),
        ("training", [4, 14], (15, False)),  # a row has the number of steps before it
        (None, [4, 9], (10, False)),
        (None, [], (0, False)),
    ],
)
def test_the_last_step_that_is_known(state, logged, found, tmp_path):
    if state:
        (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 12}))
    rows = "".join(f"{step},0.5\n" for step in logged)
    (tmp_path / "metrics.csv").write_text(f"step,train/loss\n{rows}")
    assert last_step(tmp_path) == found


@pytest.mark.parametrize(
    ("words", "warned"), [(["data.training.samples=4"], True), (SHORT[:1], False)]
)
def test_a_single_step_is_warned_of(words, warned, run_train, tmp_path, caplog):
    run_train(tmp_path / "run", *words, "test=false")
    said = "single optimizer step: raise trainer.max_epochs, or lower data.global_batch_size=4"
    assert (said in caplog.text) == warned


def test_times_and_counts_in_words():
    assert [duration(s) for s in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]
    assert [short(n) for n in (12, 437_000, 135e6, 7.6e9)] == ["12", "437 K", "135 M", "7.6 B"]
