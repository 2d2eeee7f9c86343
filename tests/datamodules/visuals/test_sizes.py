"""The size of frames: each policy and filter, by published processors and by hand."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from datamodules.errors import BadSampleError
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from datamodules.visuals.sizes import Crop, Fixed, Native, Pad, Square, resized, smart_resize
from tests.helpers.films import film, turned

FACTOR = 28
SIZES = [(45, 60), (60, 45), (33, 33), (90, 31), (17, 200), (336, 336)]
FILTERS = ["bicubic", "area", "nearest"]
#: Policies and the side that they are used with.
POLICIES = {
    "square": (Square(), 32),
    "pad": (Pad(), 32),
    "crop": (Crop(), 32),
    "fixed": (Fixed(40, 24), None),
    "native": (Native(min_pixels=784, max_pixels=8 * 784), None),
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def lossless(pictures: list[np.ndarray]) -> bytes:
    """Returns a video whose decoded RGB equals the pictures."""
    return film(pictures, "matroska", "ffv1", "bgr0")


def reader(policy, side=None, filter: str | None = "bicubic", frames=2) -> FrameReader:
    return FrameReader(side, UniformSampler(frames), policy=policy, filter=filter)


def as_picture(frame) -> np.ndarray:
    return frame.permute(1, 2, 0).numpy()


# --- against published processors -----------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 45, 224])
def test_crop_equals_clips_own_processor(size, side):
    picture = noise(*size)
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_rescale=False,
        do_normalize=False,
    )
    theirs = clip(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
    read = reader(Crop(), side)
    assert np.array_equal(read.image(png(picture))[0].numpy(), theirs)
    if not (size[0] % 2 or size[1] % 2):
        assert np.array_equal(read.video(lossless([picture] * 2))[1].numpy(), theirs)


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) >= FACTOR])
def test_native_equals_qwen2_vls_own_processor(size):
    picture = noise(*size)
    limits = {"shortest_edge": 4 * 784, "longest_edge": 20 * 784}
    qwen = Qwen2VLImageProcessorPil(size=limits, do_rescale=False, do_normalize=False)
    theirs = qwen(Image.fromarray(picture), return_tensors="np")
    ours = reader(Native(min_pixels=4 * 784, max_pixels=20 * 784)).image(png(picture))[0]
    t, rows, columns = theirs["image_grid_thw"][0].tolist()
    assert ours.shape == (3, 14 * rows, 14 * columns)
    # their order: time, row and column of a block of 2 x 2, row and column in it, channel, frame
    blocks = theirs["pixel_values"].reshape(t, rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    whole = blocks.transpose(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2, 3, *ours.shape[1:])
    assert np.array_equal(ours.numpy(), whole[0])


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40), (60, 60), (1, 500), (37, 91)])
def test_pad_centres_the_whole_picture_on_its_color(height, width):
    color, side = (10, 20, 30), 32
    frame = as_picture(
        reader(Pad(color), side).image(png(np.full((height, width, 3), 200, "u1")))[0]
    )
    covered = (frame != color).all(2)
    rows, columns = covered.any(1).nonzero()[0], covered.any(0).nonzero()[0]
    assert covered.sum() == len(rows) * len(columns)  # one rectangle
    assert (frame[covered] == 200).all()
    scale = side / max(height, width)
    assert (len(rows), len(columns)) == (
        max(1, round(height * scale)),
        max(1, round(width * scale)),
    )
    for inside in (rows, columns):
        before, after = inside[0], side - 1 - inside[-1]
        assert 0 <= after - before <= 1


def test_the_filling_is_llavas_and_can_be_another():
    picture = png(noise(40, 80))
    assert as_picture(reader(Pad(), 32).image(picture)[0])[0, 0].tolist() == [122, 116, 104]
    assert as_picture(reader(Pad([1, 2, 3]), 32).image(picture)[0])[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"policy\.color is \[0, 0, 256\]; set red, green and blue"
    ):
        Pad([0, 0, 256])


def test_crop_keeps_the_middle_and_no_more():
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 200
    assert (reader(Crop(), 20, "nearest").image(png(picture)) == 200).all()


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_height_width_and_channels_keep_their_places(policy, filter):
    """Exchanged rows and columns, or channels, would give another picture in every policy."""
    picture = np.zeros((56, 112, 3), np.uint8)
    picture[:28, :56], picture[:28, 56:], picture[28:, :56] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    read = reader(*POLICIES[policy], filter=filter)
    for frame in (read.image(png(picture))[0], read.video(lossless([picture] * 3))[1]):
        height, width = frame.shape[1:]
        expected = {"square": (32, 32), "pad": (32, 32), "crop": (32, 32), "fixed": (40, 24)}
        assert (height, width) == expected.get(policy, (56, 112))
        middle = as_picture(frame).astype(int)
        for y, x, color in [
            (0.35, 0.25, (250, 0, 0)),
            (0.35, 0.75, (0, 250, 0)),
            (0.65, 0.25, (0, 0, 250)),
        ]:
            seen = middle[int(y * height), int(x * width)]
            assert np.abs(seen - color).max() <= 12, (y, x)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turned_video_is_that_of_its_upright_pictures(policy):
    """The tall film is wide on disk, with a quarter turn. Its frames must have the tall size."""
    picture = noise(6, 4).repeat(16, axis=0).repeat(16, axis=1)  # 96 x 64
    lying = np.ascontiguousarray(picture.swapaxes(0, 1))
    upright, stored = film([picture] * 3, crf=1), film([lying] * 3, crf=1)
    read = reader(*POLICIES[policy])
    frames, again = read.video(upright), read.video(turned(stored, 0, 1, 1, 0))
    assert frames.shape == again.shape
    assert (frames.int() - again.int()).abs().float().mean() < 3  # they were encoded separately


# --- filters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", ["bicubic", "nearest"])
def test_pillows_filters_are_those_of_images_and_videos(filter):
    pictures = [noise(48, 64, seed) for seed in range(3)]
    kind = getattr(Image.Resampling, filter.upper())
    expected = [np.asarray(Image.fromarray(each).resize((20, 20), kind)) for each in pictures]
    read = reader(Square(), 20, filter, frames=3)
    assert np.array_equal(read.image(png(pictures[0]))[0].permute(1, 2, 0), expected[0])
    frames = read.video(lossless(pictures)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(frames, np.stack(expected))


def test_without_a_filter_images_are_bicubic_and_videos_are_averaged():
    picture = noise(48, 64)
    image, video = png(picture), lossless([picture] * 2)
    none, bicubic, area = (reader(Square(), 20, name) for name in (None, "bicubic", "area"))
    assert (none.image(image) == bicubic.image(image)).all()
    assert (none.video(video) == area.video(video)).all()
    assert (bicubic.video(video) != area.video(video)).any()
    assert (bicubic.image(image) != area.image(image)).any()


def test_each_filter_has_its_own_pixels():
    picture = noise(48, 60)
    frames = {name: reader(Square(), 12, name).image(png(picture))[0] for name in FILTERS}
    for name, frame in frames.items():
        assert all((frame != other).any() for key, other in frames.items() if key != name)
    means = picture.reshape(12, 4, 12, 5, 3).mean((1, 3))
    assert np.abs(as_picture(frames["area"]) - means).max() <= 1
    assert np.array_equal(as_picture(frames["nearest"]), picture[2::4, 2::5])


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 2)])
def test_the_smallest_pictures_are_read(size, filter):
    for policy, side in POLICIES.values():
        frame = reader(policy, side, filter).image(png(np.full((*size, 3), 90, np.uint8)))
        assert (frame[:, :, frame.shape[2] // 2, frame.shape[3] // 2] == 90).all()


# --- native sizes ---------------------------------------------------------------------------------


def test_sizes_are_multiples_within_the_limits():
    rng = np.random.default_rng(0)
    for _ in range(5000):
        height, width = (np.exp(rng.uniform(0, 8.5, 2))).astype(int).tolist()
        if max(height, width) > 200 * min(height, width):
            continue
        factor, least, more = (int(rng.integers(1, most)) for most in (40, 60, 200))
        low, most = least * factor**2, (least + more) * factor**2
        rows, columns = smart_resize(height, width, factor, low, most)
        assert rows % factor == columns % factor == 0
        assert min(rows, columns) >= factor
        nearest = [max(factor, round(side / factor) * factor) for side in (height, width)]
        if low <= math.prod(nearest) <= most:
            assert [rows, columns] == nearest
        elif math.prod(nearest) < low:
            assert rows * columns >= low
        else:
            assert rows * columns <= most or min(rows, columns) == factor
        # a picture on its side has the same size on its side
        assert smart_resize(width, height, factor, low, most) == (columns, rows)


@pytest.mark.parametrize("whole", [False, True])
def test_more_frames_never_make_larger_frames(whole):
    policy = Native(total_pixels=6_272_000, whole_pixels=whole)
    budgets = [policy.most_pixels(frames) for frames in range(1, 1500)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == 768 * 784
    for frames, budget in enumerate(budgets, start=1):
        if budget > int(1.05 * policy.min_pixels):
            assert budget * frames <= 2 * 6_272_000 * (1 + 1e-9)


def test_frames_of_a_video_are_smaller_the_more_there_are():
    data = lossless([noise(112, 168, seed) for seed in range(8)])
    policy = Native(min_pixels=784, total_pixels=4 * 24 * 784)
    shapes = [reader(policy, frames=count).video(data).shape for count in (2, 8, 24)]
    assert [tuple(shape[2:]) for shape in shapes] == [(112, 168), (112, 168), (56, 84)]
    assert reader(policy).image(png(noise(112, 168))).shape == (1, 3, 112, 168)


def test_visuals_have_their_own_sizes_and_the_times_of_their_frames():
    read = FrameReader(None, FpsSampler(5.0, 100), policy=Native(min_pixels=784), filter="bicubic")
    wide = read.read("a.mkv", lossless([noise(56, 112)] * 10))
    tall = read.read("b.png", png(noise(112, 56)))
    assert (wide.frames.shape, tall.frames.shape) == ((5, 3, 56, 112), (1, 3, 112, 56))
    assert wide.info.seconds == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert tall.info.seconds is None


def test_a_video_whose_size_changes_has_one_size():
    small, large = (film([noise(*size)] * 3, "mpegts") for size in ((56, 112), (112, 56)))
    frames = reader(Native(min_pixels=784), frames=4).video(small + large)
    assert frames.shape == (4, 3, 56, 112)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["crop", "native"])
@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (2, 402)])
def test_a_picture_that_is_too_narrow_has_a_reason(policy, size):
    with pytest.raises(BadSampleError) as caught:
        reader(*POLICIES[policy]).read("thin.png", png(noise(*size)))
    assert caught.value.reason == "aspect_ratio"
    assert caught.value.detail.startswith(f"thin.png: {size[1]} x {size[0]}: one side is over 200")
    assert reader(*POLICIES[policy]).image(png(noise(2, 400))).numel()  # the limit itself


@pytest.mark.parametrize("policy", ["crop", "native"])
def test_a_video_that_is_too_narrow_has_a_reason(policy):
    with pytest.raises(BadSampleError) as caught:
        reader(*POLICIES[policy]).read("thin.mkv", lossless([noise(2, 402)] * 2))
    assert caught.value.reason == "aspect_ratio"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_pixels": 783, "min_pixels": 100}, "max_pixels leaves 783 pixels a frame, less than"),
        ({"total_pixels": 300}, "total_pixels=300 for 1 frames leaves 600 pixels a frame"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "min_pixels is 9000, above max_pixels=8000"),
        ({"factor": 0}, "factor is 0; set it to 1 or more"),
        ({"min_pixels": -1}, "min_pixels is -1; set it to 1 or more"),
        ({"temporal": 0}, "temporal is 0; set it to 1 or more"),
    ],
)
def test_limits_that_leave_no_frame_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Native(**arguments)


def test_a_budget_is_checked_for_the_most_frames_that_are_sampled():
    policy = Native(min_pixels=128, total_pixels=784 * 10)
    reader(policy, frames=20)
    with pytest.raises(ValueError, match="total_pixels=7840 for 21 frames leaves 746"):
        reader(policy, frames=21)
    with pytest.raises(ValueError, match="for 21 frames"):
        FrameReader(None, FpsSampler(1.0, 21), policy=policy)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"filter": "lanczos"}, "filter is lanczos; set bicubic, area or nearest, or null"),
        ({"policy": "pad"}, "policy is pad; choose one by data/frames=square, pad, crop, fixed"),
        ({"policy": Native()}, "image_size is 32 with Native frames; set it to null"),
        ({"image_size": None}, "image_size is null with Square frames; set it to the side"),
        ({"policy": Pad(), "tiles": [[1, 2]]}, "tiles are cut for square frames, not for Pad"),
        (
            {"policy": Fixed(2, 3), "image_size": None, "tiles": [[1, 2]]},
            "tiles are cut for square frames, not for Fixed",
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        FrameReader(**{"image_size": 32, "sampler": UniformSampler(1), **arguments})


def test_a_fixed_size_needs_pixels():
    with pytest.raises(ValueError, match="policy is 0 x 5; set height and width to 1 or more"):
        Fixed(0, 5)


@pytest.mark.parametrize("filter", FILTERS)
def test_tiles_are_resized_by_the_filter(filter):
    picture = noise(40, 80)
    read = FrameReader(20, UniformSampler(1), tiles=[[1, 2]], filter=filter)
    visual = read.read("a.png", png(picture))
    thumbnail = resized(Image.fromarray(picture), 20, 20, filter)
    assert np.array_equal(as_picture(visual.frames[0]), np.asarray(thumbnail))
    both = resized(Image.fromarray(picture), 20, 40, filter)
    assert np.array_equal(np.hstack([as_picture(f) for f in visual.frames[1:]]), np.asarray(both))
