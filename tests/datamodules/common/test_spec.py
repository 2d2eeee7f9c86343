"""The builder of specs: what it builds from a file that a stranger may have written."""

import pytest

from datamodules.common.spec import build, class_name
from datamodules.visuals.frames import FrameReader, UniformSampler

SAMPLER = {"_target_": "datamodules.visuals.frames.UniformSampler", "num_frames": 4}


def test_nested_specs_are_built_first_and_hydras_keys_left_out():
    path = "datamodules.visuals.frames.FrameReader"
    spec = {"_target_": path, "sampler": SAMPLER, "image_size": 8, "_partial_": True}
    reader = build(spec, "datamodules", FrameReader)
    assert isinstance(reader, FrameReader)
    assert isinstance(reader.sampler, UniformSampler)
    assert class_name(spec) == "FrameReader"


def test_a_nested_spec_must_be_of_its_kind():
    spec = {"_target_": "datamodules.visuals.frames.FrameReader", "sampler": SAMPLER}
    with pytest.raises(
        ValueError, match=r"UniformSampler' refused: it is not a subclass of FrameReader"
    ):
        build(spec, "datamodules", nested=FrameReader)


@pytest.mark.parametrize("path", ["lightning_modules.model.VideoLanguageModel", "os.system", "x"])
def test_each_package_builds_its_own_classes_only(path):
    with pytest.raises(ValueError, match=f"class '{path}' refused: only classes under datamodules"):
        build({"_target_": path}, "datamodules")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"num_frames": 1}, "needs a `_target_`"),
        ({**SAMPLER, "frames": 1}, "UniformSampler: .*fra"),
    ],
)
def test_mistakes_are_one_line(spec, says):
    with pytest.raises(ValueError, match=says) as raised:
        build(spec, "datamodules")
    assert "\n" not in str(raised.value)
