"""A run directory is data: ropelab-evaluate runs no code that somebody put into one.

Each test runs the program. `test_replay.py` has the details, without the program.
"""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from experiments import evaluate


@pytest.fixture(scope="module")
def trained(run_train, tmp_path_factory) -> Path:
    """A run of one second, whose words a test may change."""
    folder = tmp_path_factory.mktemp("runs") / "victim"
    run_train(
        folder, "rotary=mrope", "data.training.samples=8", "data.grid.frames=[4]", "test=false"
    )
    return folder


@pytest.fixture
def hostile(trained, tmp_path) -> Path:
    """A copy of the run from a stranger. Code in its `hub/` leaves a mark if it runs."""
    folder = shutil.copytree(trained, tmp_path / "theirs")
    mark = repr(str(tmp_path / "mark"))
    code = f"open({mark}, 'w').close()\ndef m(**_): pass\n"
    (folder / "hub").mkdir()
    for name in ("hubconf", "intruder"):
        (folder / "hub" / f"{name}.py").write_text(code)
    return folder


@pytest.fixture
def attack(hostile, tmp_path, monkeypatch):
    """Evaluates the run with `words` in its overrides and `typed` on the command line.

    Returns the line that the program ends with, or None. `{run}` in words is the directory.
    """
    monkeypatch.syspath_prepend(hostile / "hub")  # the intruder can be imported
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(*words: str, typed: tuple[str, ...] = ()) -> str | None:
        path = hostile / ".hydra" / "overrides.yaml"
        own = yaml.safe_load(path.read_text())
        told = [word.replace("{run}", str(hostile)) for word in words]
        options = [word for word in told if word.startswith("-")]  # argparse needs them first
        others = [word for word in told if word not in options]
        path.write_text(yaml.safe_dump([*options, *own, *others]))
        out = tmp_path / "out"
        argv = ["ropelab-evaluate", f"run={hostile}", *typed, f"hydra.run.dir={out}"]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.chdir(tmp_path)
        try:
            evaluate.main()
        except SystemExit as end:
            return str(end.code)
        finally:
            sys.modules.pop("intruder", None)
        return None

    return run


def was_run(tmp_path: Path) -> bool:
    return (tmp_path / "mark").exists()


HUB = "+logger.x={_target_: torch.hub.load, repo_or_dir: '{run}/hub', model: m, source: local}"
HUB = "+logger.x={_target_: torch.hub.load, repo_or_dir: '{run}/hub', model: m, source: local}"


def test_a_class_of_others_is_not_built(attack, tmp_path):
    line = attack(HUB)
    assert not was_run(tmp_path)
    assert line is not None
    assert "logger.x._target_=torch.hub.load, which is not a class of this package" in line
    assert line.endswith("add 'trust=[torch]' if you know who made it")


def test_a_users_own_package_is_built_where_it_is_trusted(attack, tmp_path):
    """`m` makes no logger, but the test only needs to know whether it was called."""
    attack("+logger.x={_target_: intruder.m}", typed=("trust=[intruder]",))
    assert was_run(tmp_path)


@pytest.mark.parametrize("command", ["pipe:touch {mark}", "{pip,}e:touch {mark}"])
def test_a_command_of_the_shell_is_not_run(command, attack, tmp_path):
    command = command.replace("{mark}", str(tmp_path / "mark"))
    line = attack(f"data.shards.needles.test='{command}'")
    assert not was_run(tmp_path)
    assert line is not None
    assert "add 'trust=[pipe:]'" in line


def test_it_is_where_the_user_asks_for_it(attack, tmp_path, needle_shards):
    shard = needle_shards / "vniah" / "needles-test.tar"
    word = f"data.shards.needles.test='pipe:touch {tmp_path}/mark; cat {shard}'"
    assert attack(word, typed=("trust=[pipe:]",)) is None
    assert was_run(tmp_path)
    assert (tmp_path / "out" / "needle.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ["--config-dir={run}/hub", "+group=evil"],
        ["tiles=" + 12 * "../" + "{run}/hub/group/evil"],
    ],
    ids=["a folder of options", "a path"],
)
def test_no_options_come_from_its_folder(words, attack, hostile, tmp_path):
    """Hydra calls the entries of `hydra.callbacks` before the program begins."""
    (hostile / "hub" / "group").mkdir()
    evil = "# @package hydra.callbacks\nx: {_target_: intruder.m}\n"
    (hostile / "hub" / "group" / "evil.yaml").write_text(evil)
    line = attack(*words)
    assert not was_run(tmp_path)
    assert line is not None
    assert str(hostile) in line


def test_where_the_run_lay_and_wrote_is_not_replayed(attack, tmp_path):
    words = [f"paths.run={tmp_path}/elsewhere", "+trust=[intruder]", "resume=false", "run=x"]
    assert attack(*words, "hydra.run.dir=x", "launcher=slurm") is None
    assert (tmp_path / "out" / "needle.json").is_file()
    assert not (tmp_path / "elsewhere").exists()
