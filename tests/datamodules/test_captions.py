"""Captions as data: which text of a sample is the caption, and how much of it is read."""

import json

import pytest

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.errors import BadSampleError
from datamodules.sample.captions import CaptionEncoder
from datamodules.sample.conversation import parse_sample
from datamodules.sample.tokenizer import tiny_tokenizer
from datamodules.shards.synthetic_captions import KINDS, make_captioned


def test_a_caption_fills_the_context_and_keeps_its_end():
    words = "red " * 300
    raw = {"json": json.dumps({"caption": words}).encode(), "jpg": b""}
    turns, suffixes = parse_sample(raw)
    encoded = CaptionEncoder(max_prompt_length=248)(turns)
    assert suffixes == ["jpg"]
    assert encoded.input_ids == [VISUAL_SLOT]
    assert encoded.labels == [IGNORE_INDEX]
    assert len(encoded.prompt_ids) == 248
    assert encoded.prompt_ids[-1] == tiny_tokenizer().eos_token_id
    assert len(CaptionEncoder(max_prompt_length=77)(turns).prompt_ids) == 77


def test_the_caption_of_a_conversation_is_its_answers_alone():
    texts = ["<video>\nDescribe it.", "A red bike.", "And?", "A dog."]
    roles = ["human", "gpt"] * 2
    entry = {"conversations": [{"from": r, "value": t} for r, t in zip(roles, texts, strict=True)]}
    turns, _ = parse_sample({"json": json.dumps(entry).encode(), "mp4": b""})
    ids = CaptionEncoder()(turns).prompt_ids
    assert tiny_tokenizer().decode(ids, skip_special_tokens=True) == "A red bike. A dog."


@pytest.mark.parametrize("names", [[], ["0.jpg", "1.jpg"]])
def test_a_caption_has_one_visual(names):
    turns = [{"from": "human", "value": "<image>" * len(names)}, {"from": "gpt", "value": "A dog."}]
    raw = {"json": json.dumps({"conversations": turns}).encode(), **dict.fromkeys(names, b"")}
    with pytest.raises(BadSampleError, match=f"not_one_visual: {len(names)} visuals"):
        CaptionEncoder()(parse_sample(raw)[0])


def test_a_caption_that_is_no_text_is_a_bad_sample():
    with pytest.raises(BadSampleError, match="missing_field"):
        parse_sample({"json": b'{"caption": null}', "jpg": b""})


def test_synthetic_captions_tell_only_behind_the_77th_token():
    tokenizer = tiny_tokenizer()
    for seed in range(0, len(KINDS), 9):
        turns, _ = parse_sample(make_captioned(seed, num_frames=2))
        ids = CaptionEncoder(max_prompt_length=248)(turns).prompt_ids
        shape, color, ground = KINDS[seed]
        before, behind = tokenizer.decode(ids[:77]), tokenizer.decode(ids[77:])
        assert len(ids) < 248
        assert f"{color} {shape} is in front of {ground}." in behind
        assert not any(f" {word}" in before for word in (shape, color, ground))
