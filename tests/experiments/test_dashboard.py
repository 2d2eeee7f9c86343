"""ropelab-dashboard: the workspace of an ablation, built offline, and sent to a server."""

import json
from pathlib import Path

import pytest
import yaml

from experiments.dashboard import main
from tests.helpers.wandb_server import WandbServer


@pytest.fixture
def ablation(tmp_path) -> Path:
    """2 x 2 x 2 runs, one of which has logged nothing yet."""
    folder = tmp_path / "runs" / "abl"
    for n in range(8):
        words = [f"rotary={('tad', 'mrope')[n & 1]}", f"seed={n >> 1 & 1}"]
        words += [f"model.rotary.theta={(1, 2)[n >> 2]}"]
        make_run(folder / str(n), words)
    (folder / "7" / "metrics.csv").unlink()
    return folder


def make_run(folder: Path, words: list[str]) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    hydra = {"hydra": {"runtime": {"choices": {"rotary": "tad", "pooler": "none"}}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    config = {
        "name": "abl",
        "job_type": "train",
        "logger": {
            "wandb": {"project": "ropelab", "group": "abl", "best": {"val/loss": "min"}},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = "epoch,lr-AdamW,needle/plain,step,train/loss,train/tokens_per_s,val/loss"
    (folder / "metrics.csv").write_text(f"{names}\n0,1,,0,1,1,\n")


def build(folder: Path, *arguments: str) -> dict:
    assert main([str(folder), *arguments]) == 0
    return json.loads((folder / "dashboard.json").read_text())


def sections(view: dict) -> dict[str, list[dict]]:
    found = view["spec"]["section"]["panel_bank_config"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def test_every_axis_is_ranked_with_its_spread(ablation):
    view = build(ablation)
    theta, rotary = "model.value.rotary.theta", "choice.value.rotary"
    bars = [p["config"] for p in sections(view)["Ranking"] if p["view_type"] == "Bar Chart"]
    assert [bar.get("group_by") for bar in bars] == [rotary, theta, None]
    assert {bar["group_agg"] for bar in bars} == {"mean"}
    assert {bar["group_area"] for bar in bars} == {"stddev"}
    assert {name for bar in bars for name in bar["metrics"]} == {"needle/plain"}
    (runs,) = view["spec"]["section"]["run_sets"]
    assert [key["name"] for key in runs["grouping"]] == [rotary, theta]
    told = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
    assert told == {"group": "abl", "jobType": "train"}


def test_everything_that_was_logged_has_its_panel(ablation):
    found = sections(build(ablation, "--metric", "val/loss"))
    curves = {
        name: [p["config"]["metrics"] for p in found[name]]
        for name in ("Validation", "Training", "Throughput")
    }
    assert curves == {
        "Validation": [["needle/plain"], ["val/loss"]],
        "Training": [["lr-AdamW"], ["train/loss"]],
        "Throughput": [["train/tokens_per_s"]],
    }
    assert {p["config"]["x_axis"] for p in found["Validation"]} == {"trainer/global_step"}
    assert found["Ranking"][0]["config"]["metrics"] == ["val/loss.min"]
    assert found["Heatmaps"][0]["config"]["media_keys"] == ["needle/heatmap"]
    assert "val/generations" in json.dumps(found["Generations"])
    assert len(found["System"]) == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--metric", "val/los"], "error: no run has logged 'val/los'; there are: lr-AdamW, "),
        (["--axis", "pooler"], "error: the runs do not differ in 'pooler'; they do in: rotary, "),
        (["--axis", "poolr"], "error: the runs do not differ in 'poolr'; they do in: rotary, "),
    ],
)
def test_what_no_run_has_is_one_line(arguments, line, ablation, capsys):
    assert main([str(ablation), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1
    assert not (ablation / "dashboard.json").exists()


def test_saved_again_it_is_the_same_view(ablation, monkeypatch, capsys):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        build(ablation, "--save")
        build(ablation, "--save", "--metric", "val/loss")
        (view,) = server.views.values()
        assert (view["projectName"], view["entityName"]) == ("ropelab", "team")
        assert "val/loss.min" in view["spec"]
        assert server.url in capsys.readouterr().out
        assert server.unknown == []
