"""The example of a user's own data: what it asks is true, and cannot be guessed."""

import json
from collections import Counter

import numpy as np
import pytest

from datamodules.shards.demo import read_films
from datamodules.shards.example import COLOURS, write_example
from datamodules.visuals.frames import FrameReader
from experiments import shards

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example") / "my_videos"
    write_example(folder)
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    """The entries of `val.json`."""
    return json.loads((folder / "val.json").read_text())


@pytest.fixture(scope="module")
def learnt(folder):
    """The entries of `train.json`."""
    return json.loads((folder / "train.json").read_text())


def see_cards(path):
    """The colours of the cards of a clip, in order. A card covers the middle of a frame."""
    frames = FrameReader(128, lambda times: list(range(len(times)))).video(path.read_bytes())
    middle = frames.permute(0, 2, 3, 1)[:, 40:88, 40:88].reshape(len(frames), -1, 3).numpy()
    seen = []
    for pixels in middle.astype(int):
        for name, colour in COLOURS.items():
            near = (abs(pixels - np.array(colour)).max(-1) < 40).mean()
            if near > 0.2 and name not in seen:
                seen.append(name)
    return seen


def test_the_files_are_the_same_every_time(folder, tmp_path):
    write_example(tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 240 + 48 + 2
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_right_answers_are_seen_in_the_clips(folder, asked, learnt):
    options = asked[0]["question"]["options"]
    for entry in [*asked, *learnt]:
        cards = see_cards(folder / entry["video"])
        turns = [turn["value"] for turn in entry["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
            text, *shown = question.removeprefix("<video>\n").splitlines()
            if shown:
                assert shown == [*lines, "Answer with the letter."]
                right = options["ABCD".index(answer)]
            else:
                assert entry in learnt
                text = text.removesuffix(" Answer with its colour.")
                right = answer.lower()
            assert len(cards) == (1 if text == "Which colour is the card?" else 2)
            assert right == cards[-1 if text == "Which card comes last?" else 0]


def test_half_of_the_training_asks_for_words(learnt):
    forms = Counter(
        "\n" in turn["value"].removeprefix("<video>\n")
        for entry in learnt
        for turn in entry["conversations"]
        if turn["from"] == "human"
    )
    assert 0.45 < forms[True] / forms.total() < 0.55


def test_without_the_frames_every_letter_is_as_likely(asked):
    questions = {}
    for entry in asked:
        text = entry["conversations"][0]["value"]
        questions.setdefault(text, []).append(entry["question"])
        assert entry["conversations"][1]["value"] == entry["question"]["answer"]
    assert [len(facts) for facts in questions.values()] == [24, 24, 24]
    for facts in questions.values():
        assert Counter(each["answer"] for each in facts) == dict.fromkeys("ABCD", 6)
    facts = [entry["question"] for entry in asked]
    assert Counter(each["category"] for each in facts) == {"colour": 24, "order": 48}
    assert len({each["group"] for each in facts}) == 48


def test_test_clips_share_no_film_with_training(asked, learnt):
    films = [{name for name, _ in read_films(split)} for split in ("train", "test")]
    assert not films[0] & films[1]
    assert not {entry["video"] for entry in learnt} & {entry["video"] for entry in asked}
    assert len({entry["video"] for entry in learnt}) == 240


def test_it_is_packed_as_it_is(folder, tmp_path):
    for split in ("train", "val"):
        command = ["pack", "--videos", folder, "--annotations", folder / f"{split}.json"]
        assert shards.main([*map(str, command), "--output", str(tmp_path / split)]) == 0
        assert shards.main(["verify", str(tmp_path / split)]) == 0


def test_a_folder_with_files_is_never_written_to(tmp_path, capsys):
    (tmp_path / "train.json").write_text("my own")
    assert shards.main(["example", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("is there already; choose a new folder\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my own"]
