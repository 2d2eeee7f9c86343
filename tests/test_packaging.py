"""Installed files, their names, and whether the documents name existing things."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from experiments import CONFIG_DIR

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "WANDB_MODE": "offline", **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["lightning_modules", "datamodules", "experiments"])
def test_packages_are_those_of_this_checkout(name):
    spec = find_spec(name)
    assert spec
    assert spec.origin
    assert Path(spec.origin).is_relative_to(ROOT)


def test_only_the_packages_are_installed(tmp_path):
    probe = (
        "from importlib.util import find_spec\n"
        "names = ('experiments', 'configs', 'tests', 'benchmarks')\n"
        "print([name for name in names if find_spec(name)])\n"
    )
    result = run(sys.executable, "-I", "-c", probe, cwd=tmp_path)
    assert result.stdout.strip() == "['experiments']", result.stderr


#: Each needs ten seconds of imports, the same as those of ropelab-train.
HEAVY = {f"ropelab-{name}" for name in ("ask", "evaluate", "export", "import", "plan", "reference")}


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[pytest.mark.slow] if s in HEAVY else []) for s in sorted(SCRIPTS)],
)
def test_programs_run_from_any_directory(script, tmp_path):
    config = CONFIG_DIR / f"{script.removeprefix('ropelab-')}.yaml"
    arguments = ["--cfg", "job"] if config.is_file() else ["--help"]
    result = run(str(Path(sys.executable).parent / script), *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir()), "asking what a program would do must not leave files"


WORKFLOWS = ("ci.yml", "versions.yml", "weekly.yml")


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def commands(name: str) -> list[str]:
    steps = [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]
    return [step["run"] for step in steps if "run" in step]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_programs_targets_and_files_that_exist(name):
    text = (ROOT / name).read_text()
    assert set(re.findall(r"\bropelab-[a-z]+", text)) <= set(SCRIPTS)
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", text, flags=re.M)) <= make_targets()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert not [link for link in links if not (ROOT / link).exists()]


def test_ci_and_readme_run_the_same_targets():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "for target in check test" in script.read_text()
    assert ".ci/run" in commands("ci.yml")
    assert "make demo" in commands("ci.yml")
    assert "make slow" in commands("weekly.yml")
    assert "schedule" in workflow("weekly.yml")[True]  # YAML reads `on` as true
    named = {word for name in WORKFLOWS for word in re.findall(r"make (\w+)", str(commands(name)))}
    assert named <= make_targets()


def test_the_ends_of_the_ranges_are_tested_and_block_nothing():
    job = workflow("versions.yml")["jobs"]["test"]
    assert job["continue-on-error"] is True
    assert job["env"] == {"VERSIONS": "${{ matrix.versions }}"}
    assert job["strategy"]["matrix"]["versions"] == ["newest", "lowest"]
    for name in ("ci.yml", "weekly.yml"):
        callers = [job.get("uses") for job in workflow(name)["jobs"].values()]
        assert "./.github/workflows/versions.yml" in callers


def test_make_lists_its_targets():
    result = run("make", "--no-print-directory", cwd=ROOT)
    assert set(re.findall(r"^  make (\w+)", result.stdout, flags=re.M)) == make_targets()


@pytest.mark.parametrize("python", ["no-such-python", "old-python"])
def test_a_python_too_old_is_one_line(tmp_path, python):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # a comparison of versions may end with an old one
    old.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    venv = tmp_path / "venv"
    result = run("make", "-s", "install", f"VENV={venv}", f"PYTHON={python}", cwd=ROOT, PATH=path)
    first, *rest = result.stderr.splitlines()
    assert first.startswith("ropelab needs Python 3.11, 3.12 or 3.13, " + python)
    assert all(line.startswith("make") for line in rest)
    assert not venv.exists()
