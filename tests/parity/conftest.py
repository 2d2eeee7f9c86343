"""Golden cases: results of the published code. See the README beside the numbers."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
KINDS = ("rope", "rope2", "ppllava", "pooling", "videorope")


@dataclass
class Golden:
    """One pair of files: sizes and cases from the `.json`, numbers from the `.safetensors`."""

    name: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("weights/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("weights/")
        }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `<kind>_golden` runs on every pair in that folder, and fails without any."""
    for kind in KINDS:
        if f"{kind}_golden" in metafunc.fixturenames:
            files = sorted((GOLDEN_DIR / kind).glob("*.json")) or [GOLDEN_DIR / kind]
            ids = [path.stem for path in files]
            metafunc.parametrize(f"{kind}_golden", files, ids=ids, indirect=True)


def _load(path: Path) -> Golden:
    if path.suffix != ".json":
        pytest.fail(f"no golden case in {path}")
    return Golden(
        path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    )


@pytest.fixture
def rope_golden(request: pytest.FixtureRequest) -> Golden:
    return _load(request.param)


@pytest.fixture
def rope2_golden(request: pytest.FixtureRequest) -> Golden:
    return _load(request.param)


@pytest.fixture
def ppllava_golden(request: pytest.FixtureRequest) -> Golden:
    return _load(request.param)


@pytest.fixture
def pooling_golden(request: pytest.FixtureRequest) -> Golden:
    return _load(request.param)


@pytest.fixture
def videorope_golden(request: pytest.FixtureRequest) -> Golden:
    return _load(request.param)
