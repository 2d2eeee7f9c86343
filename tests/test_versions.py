"""Installed versions: the ranges, the lock, and what makes `make` install again."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


def direct() -> dict[str, Requirement]:
    """Returns the requirements of pyproject.toml itself, by name."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    found = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    del found["ropelab"]  # it names its own extras
    return found


def locked(python: str, system: str = "linux", machine: str = "x86_64") -> list[tuple[str, str]]:
    """Returns name and version of everything that the lock pins there."""
    there = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": system,
        "platform_machine": machine,
    }
    pins = [Requirement(line) for line in LOCK]
    return [
        (canonicalize_name(pin.name), str(pin.specifier).removeprefix("=="))
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(there)
    ]


@pytest.mark.parametrize(("system", "machine"), PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_package_once_within_its_range(python, system, machine):
    pins = locked(python, system, machine)
    assert len(dict(pins)) == len(pins)
    versions = dict(pins)
    for name, asked in direct().items():
        assert asked.specifier.contains(versions[name]), f"{name} {versions[name]}: {asked}"


def test_the_lock_holds_wherever_it_is_read():
    for line in LOCK:
        pin = Requirement(line)
        assert pin.url is None
        assert re.fullmatch(r"==[^,*+]+", str(pin.specifier)), f"{line}: one version of any build"
    assert not re.search(r"--|://|sha256", "\n".join(LOCK))
    of_cuda = [line for line in LOCK if line.startswith(("nvidia", "cuda", "triton"))]
    assert not of_cuda, "these belong to one build of PyTorch"


def test_the_lock_holds_what_is_installed_beside():
    makefile = (ROOT / "Makefile").read_text()
    (weights,) = re.findall(r"^WEIGHTS := (\S+)$", makefile, flags=re.M)
    assert weights in LOCK


def test_the_same_pythons_everywhere():
    supported = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 30)]
    assert [python for python in minors if supported.contains(python)] == list(PYTHONS)
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = ci["jobs"]["check-and-test"]["strategy"]["matrix"]
    assert matrix["python"] == list(PYTHONS)
    (check,) = re.findall(r"^SUPPORTED := (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    for minor in (10, 11, 13, 14):
        command = check.replace("sys.version_info", f"(3, {minor}, 1)")
        code = subprocess.run([sys.executable, "-c", command]).returncode
        assert (code == 0) == supported.contains(f"3.{minor}.1")


def test_what_breaks_by_minor_releases_has_an_upper_bound():
    for name in ("torch", "lightning", "transformers", "peft", "wandb", "hydra-core"):
        specifier, version = direct()[name].specifier, Version(dict(locked("3.11"))[name])
        following = f"{version.major}.{version.minor + 1}"
        assert not specifier.contains(following), f"{name} {following}"


def make(*arguments: str, venv: Path) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", f"VENV={venv}", *arguments]
    env = {key: value for key, value in os.environ.items() if key not in ("VERSIONS", "MAKEFLAGS")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def installed(tmp_path) -> Path:
    """An environment as `make install` leaves it."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "uv"):
        (tmp_path / "bin" / name).touch()
    for name in ("newest.txt", "lowest.txt", ".installed-locked"):
        (tmp_path / name).touch()
    return tmp_path


def test_install_is_done_once(installed):
    assert make("-q", "install", venv=installed).returncode == 0


@pytest.mark.parametrize(
    "changed",
    [["-W", "constraints.txt"], ["-W", "pyproject.toml"], ["VERSIONS=newest"], ["VERSIONS=lowest"]],
)
def test_install_again_where_versions_changed(installed, changed):
    assert make("-q", *changed, "install", venv=installed).returncode == 1
    assert make("-q", *changed, "test", venv=installed).returncode == 1


@pytest.mark.parametrize("versions", ["locked", "newest", "lowest"])
def test_each_choice_of_versions_constrains_every_install(installed, versions):
    result = make("-n", "-W", "pyproject.toml", "install", f"VERSIONS={versions}", venv=installed)
    lines = result.stdout.splitlines()
    file = "constraints.txt" if versions == "locked" else f"{installed}/{versions}.txt"
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 3, result.stderr
    assert all(f"pip install -c {file}" in line for line in installs)
    lowest = any("--resolution lowest-direct" in line for line in lines)
    assert lowest == (versions == "lowest")


@pytest.mark.parametrize("versions", ["oldest", "", "newest lowest"])
def test_another_word_for_versions_is_one_line(tmp_path, versions):
    result = make("install", f"VERSIONS={versions}", venv=tmp_path)
    assert result.returncode
    (line,) = result.stderr.splitlines()
    assert f"VERSIONS is '{versions}': take locked, newest or lowest" in line


@pytest.mark.parametrize(
    ("variables", "installs"),
    [
        ({}, False),
        ({"CI": "false"}, False),
        ({"CI": "true"}, True),
        ({"ROPELAB_CI_INSTALL": "1"}, True),
        ({"CI": "true", "ROPELAB_CI_INSTALL": "0"}, False),
    ],
)
def test_ci_installs_packages_only_where_it_is_asked_to(tmp_path, variables, installs):
    """The script runs in an empty folder, on a simulated system without SLURM."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "sudo", "make"):
        (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/log"\n')
        (tools / name).chmod(0o755)
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tmp_path / ".ci").mkdir()
    script = (ROOT / ".ci" / "run").read_text().replace("/usr/sbin/slurmctld", "/nowhere")
    (tmp_path / ".ci" / "run").write_text(script)
    command = [str(tools / "bash"), str(tmp_path / ".ci" / "run")]
    environment = {"PATH": str(tools), **variables}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "log").read_text()
    assert ("apt-get install" in log) == installs
    assert ("sudo" in log) <= installs
    assert log.splitlines()[-3:] == ["make check", "make test", "make recipes"]


PROBE = """
import atexit, gc

# What is registered first runs last.
atexit.register(lambda: print("frozen" if gc.get_freeze_count() else "not frozen", flush=True))
import experiments  # as the first line of every program does

class Cycle:
    def __init__(self):
        self.me = self
    def __del__(self):
        print("collected", flush=True)

kept = Cycle()
atexit.register(print, "handlers run", flush=True)
raise SystemExit(75)
"""


def test_a_program_ends_without_looking_for_garbage():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert result.returncode == 75, result.stderr
    assert result.stdout.splitlines() == ["handlers run", "frozen"]


@pytest.mark.parametrize("script", sorted(PROJECT["scripts"]))
def test_every_program_ends_so(script):
    module, _, _ = PROJECT["scripts"][script].partition(":")
    assert module.startswith("experiments."), "exit handlers of the package apply to it"
