"""The example of a user's own data: what it asks is true, and cannot be guessed."""

import json
from collections import Counter

import numpy as np
import pytest

from datamodules.shards.demo import read_films
from datamodules.shards.example import CLIPS, COLOURS, write_example
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


def see_cards(path):
    """The colours of the cards of a clip, in order. A card covers the middle of a frame."""
    frames = FrameReader(128, lambda times: list(range(len(times)))).video(path.read_bytes())
    middle = frames.permute(0, 2, 3, 1)[:, 40:88, 40:88].reshape(len(frames), -1, 3).numpy()
    seen = []
    for pixels in middle.astype(int):
        for name, colour in COLOURS.items():
            near = (abs(pixels - np.array(colour)).max(-1) < 40).mean()
            if near > 0.4 and name not in seen:
                seen.append(name)
    return seen


def test_the_files_are_the_same_every_time(folder, tmp_path):
    write_example(tmp_path / "again")
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == sum(CLIPS.values()) + 2
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_right_answers_are_seen_in_the_clips(folder, asked):
    for entry in asked:
        facts = entry["question"]
        cards = see_cards(folder / entry["video"])
        assert len(cards) == 2
        right = facts["options"]["ABCD".index(facts["answer"])]
        shown = [option for option in facts["options"] if option in cards]
        if facts["category"] == "colour":
            assert shown == [right]
        else:
            assert sorted(shown) == sorted(cards)  # so the colours alone do not answer it
            last = "comes last" in entry["conversations"][0]["value"]
            assert right == cards[-1 if last else 0]


def test_no_letter_is_more_often_right(asked):
    for category in ("colour", "order"):
        facts = [entry["question"] for entry in asked if entry["question"]["category"] == category]
        assert Counter(each["answer"] for each in facts) == dict.fromkeys("ABCD", CLIPS["val"] // 2)
    assert all(entry["conversations"][1]["value"] == entry["question"]["answer"] for entry in asked)
    assert len({entry["question"]["group"] for entry in asked}) == CLIPS["val"]


def test_test_clips_share_no_film_with_training(folder, asked):
    films = [{name for name, _ in read_films(split)} for split in ("train", "test")]
    assert not films[0] & films[1]
    learnt = json.loads((folder / "train.json").read_text())
    assert not {entry["video"] for entry in learnt} & {entry["video"] for entry in asked}
    assert len({entry["video"] for entry in learnt}) == CLIPS["train"]


def test_it_is_packed_as_it_is(folder, tmp_path):
    for split in CLIPS:
        command = ["pack", "--videos", folder, "--annotations", folder / f"{split}.json"]
        assert shards.main([*map(str, command), "--output", str(tmp_path / split)]) == 0
        assert shards.main(["verify", str(tmp_path / split)]) == 0


def test_a_folder_with_files_is_never_written_to(tmp_path, capsys):
    (tmp_path / "train.json").write_text("my own")
    assert shards.main(["example", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("is there already; choose a new folder\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my own"]
