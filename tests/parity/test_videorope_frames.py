"""VideoRoPE's frames: resized as its processor does, and in the published sizes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import BadSampleError
from datamodules.visuals.frames import FrameReader, UniformSampler
from datamodules.visuals.sizes import Native, smart_resize
from tests.helpers.films import film


def read(visual, frames, native) -> torch.Tensor:
    """Returns the frames as a reader of files sees them: PNG, or a lossless video."""
    pictures = [np.ascontiguousarray(each) for each in frames.permute(0, 2, 3, 1).numpy()]
    reader = FrameReader(None, UniformSampler(len(pictures)), policy=native, filter="bicubic")
    if visual["kind"] == "image":
        file = io.BytesIO()
        Image.fromarray(pictures[0]).save(file, "PNG")
        return reader.image(file.getvalue())
    return reader.video(film(pictures, "matroska", "ffv1", "bgr0"))


def test_resized_frames_are_equal_bit_for_bit(videorope_golden):
    processor = videorope_golden.spec["processor"]
    native = Native(processor["factor"], processor["min_pixels"], processor["max_pixels"])
    for name, visual in videorope_golden.spec["visuals"].items():
        frames = videorope_golden.tensors[f"visuals/{name}/frames"]
        expected = videorope_golden.tensors[f"visuals/{name}/resized"]
        ours = read(visual, frames, native)
        assert list(ours.shape[2:]) == visual["resized"], name
        assert torch.equal(ours, expected), name


def test_sizes_are_those_of_the_published_tables(videorope_golden):
    """Both published versions may return a side of 0; ours is one factor there."""
    for case in videorope_golden.spec["sampling"]["smart_resize"]:
        names = ("height", "width", "factor", "min_pixels", "max_pixels")
        arguments = {name: case[name] for name in names}
        expected = case["qwen_vl_utils"]
        if expected == "ValueError":
            with pytest.raises(BadSampleError):
                smart_resize(**arguments)
            continue
        assert smart_resize(**arguments) == tuple(max(side, case["factor"]) for side in expected)
        # The image processor agrees, but refuses pictures with a side below one factor.
        assert case["image_processor_4_45"] in (expected, "ValueError")
