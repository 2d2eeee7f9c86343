"""A refused command leaves no folder behind that it has made itself."""

import pytest

from experiments.checks.which_run import check_run
from experiments.run.made import make, remove_unused


@pytest.mark.parametrize("left", [(), ("run.lock",), ("run.lock", "train.log")])
def test_a_folder_without_a_run_goes_with_its_parents(left, tmp_path):
    folder = tmp_path / "runs" / "name" / "run"
    make(folder)
    for name in left:
        (folder / name).touch()
    remove_unused(folder, evaluation=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_folder_that_was_there_stays(evaluation, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    make(folder)
    remove_unused(folder, evaluation)
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("evaluation", "name", "stays"),
    [
        (False, "config.yaml", True),  # a training can go on
        (False, "shards", True),
        (True, "config.yaml", False),
        (True, "scores.json", True),
        (True, "needle.json", True),
    ],
)
def test_what_is_of_use_stays(evaluation, name, stays, tmp_path):
    beside, folder = tmp_path / "runs" / "other", tmp_path / "runs" / "run"
    beside.mkdir(parents=True)
    make(folder)
    (folder / name).touch()
    remove_unused(folder, evaluation)
    assert (folder.exists(), beside.exists()) == (stays, True)


def test_a_wrong_run_is_answered_by_those_nearby(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("name/mrope-seed0", "name/tad-seed0", "name/tad-seed0/evaluate/now"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    for wrong, why in (
        ("runs/name/mrope-sed0", "does not exist"),
        ("rnus/name/mrope-seed0", "does not exist"),
        ("runs/name", "is no run"),
    ):
        with pytest.raises(ValueError, match=rf"^run={wrong} {why}: did you mean run=runs") as told:
            check_run(tmp_path / wrong if wrong.startswith("/") else type(tmp_path)(wrong))
        assert "evaluate" not in str(told.value)
        assert "runs/name/tad-seed0" in str(told.value)
    with pytest.raises(ValueError, match=r"^run=nope does not exist: nearby: runs/name/"):
        check_run(type(tmp_path)("nope"))  # no run has a similar name
    check_run(tmp_path / "runs/name/mrope-seed0")
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="ropelab-runs lists them"):
        check_run(type(tmp_path)("nowhere/x"))
