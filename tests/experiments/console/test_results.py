"""The table at the end of a program shows what its files hold."""

import json

import pytest
from lightning.pytorch.utilities import rank_zero_only

from experiments.console.results import next_commands, tell_results


def row(name: str, value: float | None, count: int = 8, **more) -> dict:
    return {"name": name, "value": value, "count": count, "parser": None, **more}


def validation(step: int, *rows: dict, **more) -> dict:
    return {"run": "x", "step": step, "scores": list(rows), **more}


@pytest.fixture
def told(tmp_path, capsys, monkeypatch):
    """`told(done, scores, needle)` returns the lines for a run directory with these files."""
    monkeypatch.chdir(tmp_path)

    def tell(**files) -> list[str]:
        folder = tmp_path / "runs" / "name" / "run"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        tell_results(folder, ["ropelab-report runs/name"])
        return capsys.readouterr().out.splitlines()

    return tell


def test_the_last_scores_with_counts_and_the_other_metrics(told):
    assert told(
        scores=[
            validation(10, row("mc", 0.25)),
            validation(20, row("mc", 0.75, 24), row("perplexity", 3.14159)),
        ],
        done={"steps": 20, "metrics": {"train/loss": 0.5, "val/loss": 1.25, "val/mc": 0.75}},
    ) == [
        "",
        "results of runs/name/run",
        "",
        "scores at step 20",
        "  score        full  count",
        "  mc           0.75     24",
        "  perplexity  3.142      8",
        "",
        "last metrics",
        "  train/loss   0.5",
        "  val/loss    1.25",
        "",
        "next:",
        "  ropelab-report runs/name",
    ]


def test_conditions_of_a_step_stand_beside_each_other(told):
    lines = told(
        scores=[
            validation(20, row("old", 1.0), condition="blind"),
            validation(
                30,
                row("mc", 0.75, 24, higher_is_better=True),
                row("pairs", 0.5, higher_is_better=None),
                row("perplexity", 3.0, higher_is_better=False),
            ),
            validation(30, row("mc", 0.5, 23), row("pairs", None), condition="blind"),
        ],
        done={"steps": 30, "metrics": {"val/mc": 0.75, "blind/mc": 0.5, "blind/loss": 2.0}},
    )
    assert lines[3:] == [
        "scores at step 30",
        "  score                         full  blind    count",
        "  mc                            0.75    0.5  24 / 23",
        "  pairs                          0.5      -        8",
        "  perplexity (lower is better)     3      -        8",
        "",
        "last metrics",
        "  blind/loss  2",
        "",
        "next:",
        "  ropelab-report runs/name",
    ]


def test_a_needle_test_shows_its_conditions_and_canaries(told):
    found = {"mean": 0.5, "interval": [0.25, 0.75]}
    lines = told(
        needle={
            "step": 330,
            "conditions": {"plain": found | {"cells": [{}] * 40}},
            "canaries": {
                "blind": found | {"mean": 0.1, "n": 20},
                "ceiling": found | {"mean": 1.0, "n": 10},
            },
        },
        done={"steps": 330, "metrics": {"val/loss": 0.3, "score": 0.5}},
    )
    assert lines[3:11] == [
        "needles found, at step 330",
        "  condition  found          95 %  count",
        "  plain        0.5  0.25 to 0.75     40",
        "  blind        0.1  0.25 to 0.75     20",
        "  ceiling        1  0.25 to 0.75     10",
        "",
        "last metrics",
        "  val/loss  0.3",
    ]


def test_other_ranks_print_nothing(told, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert told(done={"steps": 1, "metrics": {"val/loss": 1.0}}) == []


def test_an_encoder_alone_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, module = tmp_path / "runs" / "name" / "run", "lightning_modules.training."
    assert next_commands(run, f"{module}instruct.VideoLLMModule") == [
        "ropelab-evaluate run=runs/name/run",
        "ropelab-export runs/name/run models/name/run",
        "ropelab-report runs/name",
    ]
    assert len(next_commands(run, f"{module}contrast.ClipContextModule")) == 2


@pytest.mark.parametrize(("run", "model"), [("runs/mine", "mine"), ("elsewhere/a/b", "b")])
def test_the_exported_model_is_named_like_the_run(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = next_commands(tmp_path / run, "lightning_modules.training.instruct.VideoLLMModule")
    assert commands[1] == f"ropelab-export {run} models/{model}"
