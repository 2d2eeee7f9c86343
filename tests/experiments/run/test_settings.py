"""Factors of an ablation: report, dashboard and list of runs agree on one directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import dashboard, report, runs
from experiments.run.settings import Settings, factors, find_runs


def make_run(folder: Path, words: list[str], config: Any = (), **choices: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    hydra = {"hydra": {"runtime": {"choices": {"rotary": "tad", "pooler": "none"} | choices}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, **dict(config)}))
    (folder / "metrics.csv").write_text("epoch,step,train/loss\n0,1,0.5\n")
    return folder


def by_typed_words(at: Path) -> None:
    for n, (rotary, seed) in enumerate((r, s) for r in ("tad", "mrope") for s in (0, 1)):
        make_run(at / str(n), [f"rotary={rotary}", f"seed={seed}", f"name=n{n}"], rotary=rotary)


def by_an_edited_default(at: Path) -> None:
    """Two seeds for each pooler, which nobody typed. They must not count as four seeds."""
    for n, (pooler, seed) in enumerate((p, s) for p in ("none", "average") for s in (0, 1)):
        make_run(at / str(n), [f"seed={seed}"], pooler=pooler)


def by_experiments(at: Path) -> None:
    """Each run chooses its own options, which follow from the name of the experiment."""
    for n, name in enumerate(("one", "two")):
        make_run(at / name, [f"experiment={name}"], pooler=("none", "average")[n], experiment=name)


def by_an_edited_config(at: Path) -> None:
    for n in range(2):
        make_run(at / str(n), ["rotary=tad"], {"model": {"scale": n}, "paths": {"run": str(n)}})


def by_nothing(at: Path) -> None:
    for n in range(2):
        make_run(at / str(n), ["rotary=tad", f"logger.x={n}", f"+launcher.y={n}", f"+resume={n}"])


def by_a_job_that_waits(at: Path) -> None:
    make_run(at / "0", ["rotary=tad"])
    frozen = {"hydra": {"overrides": {"task": ["rotary=mrope"]}}}
    (at / "1" / ".hydra").mkdir(parents=True)
    (at / "1" / ".hydra" / "frozen.yaml").write_text(yaml.safe_dump(frozen))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (by_typed_words, ["rotary", "seed"]),
        (by_an_edited_default, ["pooler", "seed"]),
        (by_experiments, ["experiment"]),
        (by_an_edited_config, ["model.scale"]),
        (by_nothing, []),
        (by_a_job_that_waits, ["rotary"]),
    ],
)
def test_three_programs_agree_on_what_an_ablation_varies(make, expected, tmp_path, capsys):
    make(tmp_path)
    assert runs.main([str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {tuple(run["axes"]) for run in listed} == {tuple(expected)}

    settings = [axis for axis in expected if axis != "seed"]
    (written, _) = report.write_report(report.load_runs([tmp_path]), tmp_path)
    html = written.read_text()
    assert ("Ablation of " in html) == bool(settings)
    assert f"Ablation of {' x '.join(settings)}" in html or not settings
    for run in listed:
        assert run["folder"] in html, "all programs find the same runs"

    assert dashboard.main([str(tmp_path)]) == 0
    view = json.loads((tmp_path / "dashboard.json").read_text())
    assert view["display_name"].endswith(f": {', '.join(expected)}")


def test_values_said_or_not_are_the_levels(tmp_path):
    make_run(tmp_path / "0", ["+optim.lr=2e-3"], {"optim": {"lr": 0.002}})
    make_run(tmp_path / "1", [], {"optim": {"lr": 0.001}})
    read = [Settings.read(folder) for folder in find_runs([tmp_path])]
    assert factors(read) == {"optim.lr": ["0.002", "0.001"]}
    assert factors(read[:1]) == {}


def test_folders_inside_a_run_are_no_runs(tmp_path):
    for name in ("10", "9", "2"):
        folder = make_run(tmp_path / name, [])
        make_run(folder / "evaluate", [])
    assert [folder.name for folder in find_runs([tmp_path, tmp_path / "9"])] == ["2", "9", "10"]


def test_a_damaged_file_is_an_error_only_where_one_asks_for_it(tmp_path):
    folder = make_run(tmp_path / "0", ["rotary=tad"])
    (folder / "config.yaml").write_text("a: [1")
    assert Settings.read(folder, strict=False).value("seed") is None
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML"):
        _ = Settings.read(folder).config
