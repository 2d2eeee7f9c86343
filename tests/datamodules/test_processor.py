"""The processor of a saved model: the settings of its sampler, and its tokenizer."""

import pytest

from datamodules.processor import Processor, with_sampling
from datamodules.shards.synthetic import draw_frames, encode_video

FRAMES, SIZES = "datamodules.visuals.frames", "datamodules.visuals.sizes"
READER = f"{FRAMES}.FrameReader"
SAMPLERS = {
    "uniform": {"_target_": "datamodules.visuals.frames.UniformSampler", "num_frames": 4},
    "fps": {"_target_": "datamodules.visuals.frames.FpsSampler", "fps": 2.0, "max_frames": 3},
}
QUESTION = [{"role": "user", "content": "<video>\nWhat is it?"}]


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(encode_video(draw_frames(0, 12, 32)[0]))
    return tmp_path / "clip.mp4"


@pytest.fixture(params=SAMPLERS)
def saved(request, tmp_path):
    frames = {"_target_": READER, "image_size": 16, "sampler": SAMPLERS[request.param]}
    conversation = {"_target_": "datamodules.sample.conversation.ConversationEncoder"}
    Processor(frames, conversation).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def frames_of(processor, clip, **sampling):
    return processor([QUESTION], [[clip]], **sampling).shapes[0][0]


@pytest.mark.parametrize("saved", ["uniform"], indirect=True)
def test_the_number_of_frames_is_set_for_good_or_for_a_call(saved, clip):
    processor = Processor.from_pretrained(saved)
    assert frames_of(processor, clip) == 4
    assert frames_of(processor, clip, num_frames=7) == 7
    assert frames_of(processor, clip) == 4
    more = Processor.from_pretrained(saved, num_frames=9)
    assert frames_of(more, clip) == 9
    more.save_pretrained(saved / "again")
    assert frames_of(Processor.from_pretrained(saved / "again"), clip) == 9


@pytest.mark.parametrize("saved", ["fps"], indirect=True)
def test_a_setting_of_another_sampler_is_refused_in_one_line(saved, clip):
    says = r"^FpsSampler has no num_frames: set fps, max_frames, min_frames$"
    with pytest.raises(ValueError, match=says):
        Processor.from_pretrained(saved, num_frames=16)
    processor = Processor.from_pretrained(saved)
    with pytest.raises(ValueError, match=says):
        processor([QUESTION], [[clip]], num_frames=16)
    assert frames_of(processor, clip, fps=50.0, max_frames=11) == 11


@pytest.mark.parametrize("saved", ["uniform"], indirect=True)
def test_a_number_of_frames_below_1_is_named(saved):
    with pytest.raises(ValueError, match="num_frames is 0; set it to 1 or more"):
        Processor.from_pretrained(saved, num_frames=0)


@pytest.mark.parametrize(
    ("image_size", "policy", "size"),
    [
        (16, None, (16, 16)),
        (16, {"_target_": f"{SIZES}.Pad", "color": [1, 2, 3]}, (16, 16)),
        (16, {"_target_": f"{SIZES}.Crop"}, (16, 16)),
        (None, {"_target_": f"{SIZES}.Fixed", "height": 20, "width": 40}, (20, 40)),
        (None, {"_target_": f"{SIZES}.Native", "factor": 8, "min_pixels": 64}, (32, 32)),
    ],
)
def test_the_size_of_frames_is_that_of_the_saved_policy(image_size, policy, size, clip, tmp_path):
    frames = {
        "_target_": READER,
        "image_size": image_size,
        "sampler": {"_target_": f"{FRAMES}.SpacedSampler", "fps": 8.0, "max_frames": 4},
        "policy": policy,
        "filter": "bicubic",
    }
    conversation = {"_target_": "datamodules.sample.conversation.ConversationEncoder"}
    Processor(frames, conversation).save_pretrained(tmp_path)
    saved = Processor.from_pretrained(tmp_path)
    assert saved([QUESTION], [[clip]]).shapes == [(4, 3, *size)]
    assert saved([QUESTION], [[clip]], max_frames=2).shapes == [(2, 3, *size)]


def test_a_reader_without_a_sampler_has_no_settings():
    with pytest.raises(ValueError, match="without a sampler, so there is no num_frames"):
        with_sampling({"_target_": READER, "image_size": 16}, {"num_frames": 3})


def test_the_tokenizer_is_that_of_the_llm(saved):
    processor = Processor.from_pretrained(saved)
    ids = processor.tokenizer("red card", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == "red card"
    assert processor.generation["eos_token_id"] == processor.tokenizer.eos_token_id
