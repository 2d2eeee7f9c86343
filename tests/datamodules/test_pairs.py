"""Pairs of answers as data: which tokens count, what both answers share, which pairs are bad."""

import json

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, PreferenceBatch
from datamodules.errors import BadSampleError
from datamodules.preference import decode_pair
from datamodules.sample.conversation import ConversationEncoder
from datamodules.visuals.frames import FrameReader, UniformSampler
from tests.helpers.pairs import read_pairs, stage_maker, words_of, write_pairs


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return words_of(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def make_stage(words, compose, tmp_path_factory):
    return stage_maker(words, compose, tmp_path_factory)


def encode(entry, **options):
    frames = FrameReader(32, UniformSampler(2))
    raw = {"__url__": "a.tar", "__key__": "k", "json": json.dumps(entry).encode()}
    return decode_pair(raw, frames, ConversationEncoder(**options))


def entry(**changed):
    question = {"from": "human", "value": "Which one?"}
    made = {"conversations": [question], "chosen": "the red one", "rejected": "blue"}
    return {k: v for k, v in (made | changed).items() if v is not None}


def answer_of(encoded):
    tokenizer = ConversationEncoder().tokenizer
    return tokenizer.decode([n for n in encoded.labels if n != IGNORE_INDEX])


def test_only_the_last_answer_is_judged():
    turns = [("human", "One?"), ("gpt", "first answer"), ("human", "Two?")]
    pair = encode(entry(conversations=[{"from": r, "value": t} for r, t in turns]))
    assert answer_of(pair.chosen).startswith("the red one")
    assert "first" not in answer_of(pair.chosen) + answer_of(pair.rejected)
    assert answer_of(pair.rejected).startswith("blue")
    first = next(n for n, label in enumerate(pair.chosen.labels) if label != IGNORE_INDEX)
    assert pair.chosen.input_ids[:first] == pair.rejected.input_ids[:first]


def test_answers_never_guide_the_pooler():
    pair = encode(entry(), prompt_with_answers=True)
    assert pair.chosen.prompt_ids == pair.rejected.prompt_ids == encode(entry()).chosen.prompt_ids


def test_the_fields_of_llava_hound_are_read():
    hound = entry(conversations=None, prompt="Which one?", answer="other", chosen_score=5)
    assert encode(hound) == encode(entry())


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        ({"chosen": None}, {}, "missing_field"),
        ({"rejected": " "}, {}, "missing_field"),
        ({"conversations": None}, {}, "missing_field"),
        ({"conversations": []}, {}, "missing_field"),
        ({"rejected": "the red one"}, {}, "no_preference"),
        ({"chosen": "Why? " * 50 + "a", "rejected": "Why? " * 50}, {"max_length": 64}, "no_pref"),
        (
            {"conversations": [{"from": "human", "value": "W" * 500}]},
            {"max_length": 20},
            "too_long",
        ),
        ({"conversations": [{"from": "human", "value": "<video>?"}]}, {}, "slot_mismatch"),
        ({"reference": {"chosen": -1.0}}, {}, "bad_field"),
        ({"reference": {"chosen": -1.0, "rejected": float("nan")}}, {}, "bad_field"),
        ({"reference": {"chosen": 3.0, "rejected": -1.0}}, {}, "bad_field"),
        ({"reference": [1, 2]}, {}, "bad_field"),
    ],
)
def test_a_pair_that_is_no_good_says_why(changed, options, reason):
    with pytest.raises(BadSampleError) as caught:
        encode(entry(**changed), **options)
    assert caught.value.reason.startswith(reason)


def test_both_answers_share_their_frames_on_any_device(make_stage):
    _, data = make_stage()
    batch = data.collater()(read_pairs(data, 2))
    assert isinstance(batch, PreferenceBatch)
    assert batch.rejected.pixels is batch.chosen.pixels
    moved = batch.to(torch.device("meta"))
    assert moved.chosen.input_ids.is_meta
    assert moved.rejected.labels.is_meta
    assert moved.rejected.pixels is moved.chosen.pixels
    both = batch.both()
    assert len(both) == 4
    assert [shape[0] for shape in both.shapes] == [2, 2, 2, 2]
    for row, half in enumerate((batch.chosen, batch.rejected)):
        width = half.labels.shape[1]
        assert torch.equal(both.labels[2 * row : 2 * row + 2, :width], half.labels)
        assert (both.labels[2 * row : 2 * row + 2, width:] == IGNORE_INDEX).all()
        assert not both.attention_mask[2 * row : 2 * row + 2, width:].any()
    assert (batch.first(1).questions().input_ids == VISUAL_SLOT).sum() == 1
