"""A needle test under any conditions: impossible measurements are refused before training."""

import json

import numpy as np
import pytest
from omegaconf import open_dict

from datamodules.haystack.cells import GridPlan
from datamodules.haystack.distractors import Distractors, PeriodicDistractors, SingleDistractor
from datamodules.instruct import decode_sample
from datamodules.preference import decode_pair
from datamodules.sample import conversation
from datamodules.shards.pack import _check_text
from datamodules.shards.synthetic import make_pair, make_sample
from experiments.run.compose import build, plain
from experiments.testing import describe


class Neighbours(Distractors):
    """One distractor on either side of the needle, without a period."""

    def __init__(self, distance: int = 1):
        self.distance = distance

    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        sides = (needle - self.distance, needle + self.distance)
        return [at for at in sides if 0 <= at < frames]


NEIGHBOURS = (
    "+data.grid.conditions.near="
    "{_target_: tests.experiments.whole_runs.test_conditions.Neighbours, distance: 2}"
)


@pytest.mark.parametrize("dropped", [[], ["~data.grid.conditions.periodic"]])
def test_distractors_without_a_period_are_described(dropped, tiny, compose, tmp_path):
    config = compose([*tiny, NEIGHBOURS, *dropped], tmp_path)
    model = type("Model", (), {"config": type("Config", (), {"rotary": None})})()
    model.config.rotary = plain(config.model.rotary)
    protocol = describe(config, model, 3)["protocol"]  # pyright: ignore[reportArgumentType]
    assert protocol["period"] == (0 if dropped else 3)


def test_a_run_with_such_distractors_ends_with_its_scores(run_train, tmp_path):
    run_train(tmp_path, NEIGHBOURS, "data.training.samples=4", "data.grid.frames=[4]")
    conditions = json.loads((tmp_path / "needle.json").read_text())["conditions"]
    assert list(conditions) == ["plain", "periodic", "near"]
    assert len(conditions["near"]["cells"]) == len(conditions["plain"]["cells"])


SIZES = {"frames": [4], "depths": [0.5], "needles": 2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"conditions": {}}, r"data\.grid\.conditions is empty"),
        ({"conditions": {"blind": None}}, r"data\.grid\.conditions\.blind"),
        ({"conditions": {"ceiling": None}}, r"data\.grid\.conditions\.ceiling"),
        ({"conditions": {"x": Neighbours()}, "needles": 1}, r"data\.grid\.needles is 1"),
    ],
)
def test_what_would_fail_after_the_training_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        GridPlan(**SIZES | words)


def test_what_is_no_distractors_is_refused():
    plan = GridPlan(**SIZES)
    object.__setattr__(plan, "conditions", {"x": {"period": 3}})  # as without type checks
    with pytest.raises(ValueError, match=r"data\.grid\.conditions\.x is {'period': 3}"):
        plan.__post_init__()


def test_one_needle_is_enough_without_distractors():
    assert GridPlan(**SIZES | {"needles": 1}).needles == 1


@pytest.mark.parametrize("kind", [PeriodicDistractors, SingleDistractor])
@pytest.mark.parametrize("period", [0, -3])
def test_a_period_is_a_frame_or_more(kind, period):
    with pytest.raises(ValueError, match=f"period of distractors is {period} frames"):
        kind(period)
    assert kind(1).period == 1


def test_needles_need_no_source_of_the_encoder(tiny, compose, tmp_path):
    """LLaVA's own vision tower has neither a source nor a text context."""
    config = compose(tiny, tmp_path)
    with open_dict(config):
        del config.model.encoder["source"], config.model.encoder["context_length"]
    data = build(config.data, "data")
    assert data.conversation.max_prompt_length == conversation.CLIP_CONTEXT


@pytest.fixture
def parsed(monkeypatch):
    """Returns the texts that were parsed as JSON."""
    texts: list = []

    class Counting:
        @staticmethod
        def loads(text, **options):
            texts.append(text)
            return json.loads(text, **options)

        dumps = staticmethod(json.dumps)

    for module in ("sample.conversation", "preference", "shards.pack"):
        monkeypatch.setattr(f"datamodules.{module}.json", Counting)
    return texts


@pytest.mark.parametrize("decode", [decode_sample, decode_pair, None])
def test_the_json_of_a_sample_is_parsed_once(decode, parsed, compose, tmp_path):
    make = make_pair if decode is decode_pair else make_sample
    members = make(0)
    raw = {"__url__": "s.tar", "__key__": "a", **members}
    if decode is None:
        assert _check_text(raw)
    else:
        config = compose(["experiment=resume_probe"], tmp_path)
        frames, encode = build(config.data.frames, "f"), build(config.data.conversation, "c")()
        assert decode(raw, frames=frames, conversation=encode)
    assert parsed == [members["json"]]
