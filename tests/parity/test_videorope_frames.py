"""VideoRoPE's frames: resized as its processor does, and in the published sizes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import BadSampleError
from datamodules.visuals.frames import FrameReader, SpacedSampler, UniformSampler
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


def sampled(case, sampler) -> tuple[int, list[int]]:
    """Returns the count and the numbers of the frames sampled from a case's video."""
    frames, fps = case["video"][:2]
    times = (np.arange(frames) / fps).tolist()
    counted = sampler.count(np.array([frames]), np.array([times[-1]]))
    return int(counted[0]), sampler(times)


def test_training_samples_and_sizes_as_published(videorope_golden):
    """Below two frames the published code takes none of the video; ours takes one pair."""
    for case in videorope_golden.spec["sampling"]["training"]:
        sampler = SpacedSampler(case["video_fps"], case["video_maxlen"], rounding="truncate")
        count, numbers = sampled(case, sampler)
        frames, _, height, width = case["video"]
        if not case["num_frames"]:
            assert (count, numbers) == (2, [0, frames - 1])
            continue
        assert (count, numbers) == (case["num_frames"], case["indices"])
        native = Native(
            min_pixels=case["min_pixels_seen"],
            total_pixels=case["total_pixels"],
            whole_pixels=True,
        )
        fit = native.fit(height, width, case["images_len"], 0)
        assert [fit.height, fit.width] == case["resized"]


def test_evaluation_samples_and_sizes_as_published(videorope_golden):
    """A video of one frame is an error in the published code; ours repeats the frame."""
    for case in videorope_golden.spec["sampling"]["evaluation"]:
        sampler = SpacedSampler(2.0, 768, min_frames=4, rounding="round")
        count, numbers = sampled(case, sampler)
        if not case.get("num_frames"):
            assert (count, numbers) == (2, [0, case["video"][0] - 1])
            continue
        assert (count, numbers) == (case["num_frames"], case["indices"])
        native = Native(min_pixels=case["min_pixels"], total_pixels=case["total_pixels"])
        fit = native.fit(*case["video"][2:], count, 0)
        assert [fit.height, fit.width] == case["resized"]
