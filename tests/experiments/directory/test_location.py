"""Where runs lie: the same setting finds the same directory, and two settings never share one."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.directory.location import constants

ROOT = Path(__file__).parents[3]
LIGHT = ROOT / "tests" / "experiments" / "launcher" / "cluster"


@pytest.fixture
def light(tmp_path) -> Callable[..., set[str]]:
    """`light(*words)` runs the light program. Returns the directories in which a process started.

    They are relative to the folder of the runs of this name.
    """
    runs = tmp_path / "runs" / "light"

    def starts() -> dict[str, int]:
        files = runs.rglob("starts.jsonl")
        return {str(f.parent.relative_to(runs)): len(f.read_text().splitlines()) for f in files}

    def run(*words: str) -> set[str]:
        before = starts()
        folders = ["--config-dir", str(LIGHT / "configs")]
        done = subprocess.run(
            [sys.executable, "-m", "light", *folders, *words, "steps=1"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{LIGHT}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return {folder for folder, count in starts().items() if count > before.get(folder, 0)}

    return run


def test_constants_are_what_a_sweep_does_not_vary():
    assert constants(["a=1", "b=1,2", "+c.d={e: 2}"]) == {"a", "c.d.e"}
    assert constants(["a=1", "seed=range(3)", "b='x,y'", "c=[1,2]"]) == {"a", "b", "c"}
    assert constants(["a=1", "a=1,2"]) == set()
    assert constants(["a=1", "b=2"]) == set()  # one run: every word names it


def test_constants_name_the_folder_of_a_sweep_and_not_its_runs(light, tmp_path):
    steps = "with-steps_1/"  # a word of all commands here
    assert light("-m", "seed=0,1") == {f"{steps}seed0", f"{steps}seed1"}
    folder = "with-steps_1-stubborn_true"
    words = ["-m", "stubborn=true", "value=1,2", "seed=0"]
    names = {f"{folder}/seed0-value_{value}" for value in (1, 2)}
    assert light(*words) == names
    runs = tmp_path / "runs" / "light"
    typed = yaml.safe_load((runs / folder / "multirun.yaml").read_text())["hydra"]["overrides"]
    assert typed["task"] == [*words[1:], "steps=1"]
    frozen = yaml.safe_load((runs / folder / "seed0-value_1/.hydra/frozen.yaml").read_text())
    assert frozen["run_name"] == "seed0-value_1"
    task = ["stubborn=True", "value=1", "seed=0", "steps=1"]
    assert frozen["hydra"]["overrides"]["task"] == task
    assert light(*words) == set()  # all are finished, and found


def test_sweeps_with_other_constants_do_not_meet(light):
    seen: set[str] = set()
    for more in ([], ["value=2"], ["value=3"], ["stubborn=true", "value=2"]):
        started = light("-m", "seed=0,1", *more)
        assert len(started) == 2
        assert not started & seen
        seen |= started


def test_a_run_is_found_however_it_is_asked_for(light):
    sweep = light("-m", "seed=0,1", "value=2")
    assert sweep == {f"with-steps_1-value_2/seed{seed}" for seed in (0, 1)}
    assert light("value=2.0", "seed=1") == {"with-steps_1-value_2/seed1"}  # alone
    # What was constant is swept now: only the new jobs run.
    assert light("-m", "seed=0,1", "value=2,3") == {
        f"with-steps_1/seed{seed}-value_3" for seed in (0, 1)
    }
    alone = light("value=4", "seed=0")
    assert alone == {"seed0-steps_1-value_4"}
    more = light("-m", "value=4", "seed=0,1")
    assert more == {"with-steps_1-value_4/seed1"}  # the other one was run alone


def test_a_directory_that_was_renamed_is_another_run(light, tmp_path):
    runs = tmp_path / "runs" / "light"
    (first, second) = sorted(light("-m", "seed=0,1", "value=2"))
    (runs / first).rename(runs / "with-steps_1-value_2" / "old")
    assert light("-m", "seed=0,1", "value=2") == {first}
    (runs / "with-steps_1-value_2").rename(runs / "with-mine")
    assert light("value=2", "seed=0") == {"seed0-steps_1-value_2"}
    assert second.endswith("seed1")


def test_own_names_stay_and_an_own_folder_needs_whole_names(light, tmp_path):
    assert light("-m", "run_name=r${seed}", "seed=0,1", "value=2") == {"r0", "r1"}
    light("-m", "hydra.sweep.dir=mine", "seed=0,1", "value=2")
    names = {path.name for path in (tmp_path / "mine").iterdir() if path.is_dir()}
    assert names == {f"seed{seed}-steps_1-value_2" for seed in (0, 1)}


def test_each_setting_has_one_directory_and_none_is_shared(light, tmp_path):
    """Runs all settings of three keys in sweeps that vary other keys each time."""
    values = {"seed": "0,1", "value": "1,2", "stubborn": "true,false"}
    for swept in itertools.combinations(values, 2):
        fixed = [
            f"{key}={typed.split(',')[0]}" for key, typed in values.items() if key not in swept
        ]
        light("-m", *(f"{key}={values[key]}" for key in swept), *fixed)
    light("-m", *(f"{key}={typed}" for key, typed in values.items()))
    found = [
        tuple(sorted(yaml.safe_load(path.read_text())["hydra"]["overrides"]["task"]))
        for path in (tmp_path / "runs").rglob("frozen.yaml")
    ]
    assert len(found) == len(set(found)) == 8
