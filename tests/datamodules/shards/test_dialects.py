"""Annotations of other trainers: read if their meaning is clear, otherwise refused by field."""

import json
from pathlib import Path

import pytest

from datamodules.errors import BadSampleError
from datamodules.instruct import decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.annotations.formats import to_conversation
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from tests.datamodules.shards.test_annotations import pack, turns

ASKED = turns("<video>\nWhat is it?", "A card.")
BOTH = turns("<image>\n<video>\nSame?", "Yes.")


def messages(*texts, names=("role", "content"), roles=("user", "assistant")) -> list[dict]:
    return [dict(zip(names, (roles[n % 2], text), strict=True)) for n, text in enumerate(texts)]


def part(kind: str, value, field: str | None = None) -> dict:
    return {"type": kind, field or kind: value}


READ = {
    # ms-swift
    "swift": (
        {"messages": messages("<video>\nWhat is it?", "A card."), "videos": ["a.mp4"]}, ASKED),
    "swift without a slot": (
        {"messages": messages("What is it?", "A card."), "videos": ["a.mp4"]}, ASKED),
    "a word of a slot in an answer": (
        {"messages": messages("What is it?", "A <video> tag."), "videos": ["a.mp4"]},
        turns("<video>\nWhat is it?", "A <video> tag.")),
    "system before a question without a slot": (
        {"messages": [{"role": "system", "content": "Be kind."},
                      *messages("What is it?", "A card.")], "videos": ["a.mp4"]},
        [{"from": "system", "value": "Be kind."}, *ASKED]),
    "swift, both kinds": (
        {"messages": messages("<image>\n<video>\nSame?", "Yes."), "images": ["b.jpg"],
         "videos": ["a.mp4"]}, BOTH),
    "swift query": ({"query": "What is it?", "response": "A card.", "videos": ["a.mp4"]}, ASKED),
    "swift history": (
        {"query": "And?", "response": "No.", "history": [["What is it?", "A card."]],
         "videos": ["a.mp4"], "system": "Be kind."},
        [{"from": "system", "value": "Be kind."}, *ASKED, *turns("And?", "No.")]),
    "swift sharegpt": (
        {"conversation": [{"human": "What is it?", "assistant": "A card."}], "videos": "a.mp4"},
        ASKED),
    "swift objects": (
        {"messages": messages("What is it?", "A card."), "videos": [{"path": "a.mp4"}]}, ASKED),
    # LLaMA-Factory
    "alpaca": (
        {"instruction": "<video>", "input": "What is it?", "output": "A card.",
         "videos": ["a.mp4"]}, ASKED),
    "sharegpt with system": (
        {"conversations": ASKED, "system": "Be kind.", "videos": ["a.mp4"]},
        [{"from": "system", "value": "Be kind."}, *ASKED]),
    "sharegpt with roles": (
        {"conversations": messages("<video>\nWhat is it?", "A card."), "videos": ["a.mp4"]}, ASKED),
    "from and value": (
        {"messages": messages("What is it?", "A card.", names=("from", "value")),
         "videos": ["a.mp4"]}, ASKED),
    "alpaca as pandas writes it": (
        {"instruction": "What is it?", "input": None, "output": "A card.", "history": None,
         "videos": ["a.mp4"]}, ASKED),
    "columns of other rows": (
        {"messages": messages("What is it?", "A card."), "videos": ["a.mp4"], "chosen": None,
         "rejected": None, "query": None, "prompt": None, "completion": None, "QA": None}, ASKED),
    # TRL
    "prompt and completion": (
        {"prompt": messages("What is it?"), "videos": ["a.mp4"],
         "completion": messages("A card.", roles=("assistant",))}, ASKED),
    "prompt and completion as texts": (
        {"prompt": "<video>\nWhat is it?", "completion": "A card.", "videos": ["a.mp4"]}, ASKED),
    # OpenAI and Qwen
    "parts": (
        {"messages": messages([part("video", "a.mp4"), part("text", "What is it?")], "A card.")},
        ASKED),
    "parts with a file url": (
        {"messages": messages([part("video_url", {"url": "a.mp4"}), part("text", "What is it?")],
                              [part("text", "A card.")])}, ASKED),
    "parts of both kinds": (
        {"messages": messages([part("image_url", {"url": "b.jpg", "detail": "low"}),
                               {"type": "video", "video": "a.mp4", "fps": 2.0},
                               part("text", "Same?")], "Yes.")}, BOTH),
    "parts whose files stand apart": (
        {"messages": messages([{"type": "video"}, part("text", "What is it?")], "A card."),
         "videos": ["a.mp4"]}, ASKED),
    # other names
    "video_path": ({"conversations": ASKED, "video_path": "a.mp4"}, ASKED),
    "image_paths": (
        {"conversations": BOTH, "image_paths": ["b.jpg"], "video_file": "a.mp4"}, BOTH),
    "null beside it": ({"conversations": ASKED, "video": "a.mp4", "images": None}, ASKED),
    "the same twice": ({"conversations": ASKED, "video": "a.mp4", "videos": ["a.mp4"]}, ASKED),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_is_plain_is_read(name):
    entry, expected = READ[name]
    own = to_conversation({"id": 3, **entry})
    assert own["conversations"] == expected
    assert own["video"] == "a.mp4"
    assert own.get("image") == ("b.jpg" if expected is BOTH else None)
    assert own["id"] == 3
    assert not own.keys() - {"id", "conversations", "image", "video"}
    assert to_conversation(own) == own


PAIR = {"video": "a.mp4", "conversations": turns("<video>\nWhat?"), "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": messages("What?", "x"), "rejected_response": "y", "videos": ["a.mp4"]},
        {"conversations": turns("<video>\nWhat?"), "videos": ["a.mp4"],
         "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"}},
        {"messages": messages("What?"), "videos": ["a.mp4"],
         "chosen": {"role": "assistant", "content": "x"},
         "rejected": {"role": "assistant", "content": "y"}},
        {"prompt": messages([{"type": "video"}, part("text", "What?")]), "videos": ["a.mp4"],
         "chosen": messages("x", roles=("assistant",)),
         "rejected": messages("y", roles=("assistant",))},
        {"instruction": "What?", "chosen": "x", "rejected": "y", "videos": ["a.mp4"]},
        {"prompt": "What?", "chosen": "x", "rejected": "y", "videos": ["a.mp4"]},
    ],
    ids=["ms-swift", "LLaMA-Factory", "roles", "TRL", "alpaca", "LLaVA-Hound"],
)  # fmt: skip
def test_pairs_of_other_trainers(entry):
    assert to_conversation(entry) == PAIR


TALK = {"conversations": turns("What is it?", "A card.")}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({**TALK, "clip": "a.mp4"}, "'clip' names a.mp4"),
        ({**TALK, "file": "a.MOV"}, "'file' names a.MOV"),
        ({**TALK, "media": [{"path": "a.mp4"}]}, "'media' names a.mp4"),
        ({**TALK, "image_url": "https://host/a"}, "'image_url' names https://host/a"),
        ({**TALK, "image_base64": "data:image/png;base64,AAAA"}, "'image_base64'"),
        ({**TALK, "video": "a.mp4", "video_2": "b.mp4"}, "'video_2' names b.mp4"),
        ({**TALK, "clip": "a.mp4"}, "--ignore-field clip"),
        ({**TALK, "video": "a.mp4", "videos": ["b.mp4"]}, "video and videos name different"),
        ({**TALK, "videos": [["1.jpg", "2.jpg"]]}, "videos: put the frames of a video"),
        ({**TALK, "videos": [7]}, "videos must be a file name"),
        ({**TALK, "images": ["https://host/a.jpg"]}, "images is a url: download"),
        ({**TALK, "images": ["data:image/png;base64,AA"]}, "images holds data"),
        ({"messages": messages([part("input_audio", "a.wav")], "x")}, "'input_audio'"),
        ({"messages": messages([{**part("video", "a.mp4"), "video_start": 1}], "x")},
         "'video_start' in a part of messages 0"),
        ({"messages": messages([part("video", "a.mp4")], "x"), "videos": ["b.mp4"]},
         "video and messages name different"),
        ({"messages": messages("x", None)}, "content of messages 1"),
        ({"messages": messages("x", 7)}, "messages 1 is not a text"),
        ({"messages": messages("x", "y"), **TALK}, "messages and conversations are two"),
        ({"messages": []}, "no turn in messages"),
        ({"messages": ["x"]}, "messages 0 is not an object"),
        ({"query": "x", "videos": ["a.mp4"]}, "missing_field: response"),
        ({"query": "x", "response": None}, "missing_field: response"),
        ({"completion": "x"}, "missing_field: prompt"),
        ({"prompt": "x", "completion": 7}, "completion is not a text"),
        ({"prompt": "x", "chosen": None, "rejected": "y"}, "missing_field: chosen"),
        ({"query": "x", "response": "y", "history": ["z"]}, "history"),
        ({"messages": messages("x", "y"), "rejected_messages": []}, "rejected_messages"),
        ({"system": "a", "messages": messages("b", "x", "y", roles=("system", "user"))},
         "two system prompts"),
    ],
)  # fmt: skip
def test_what_is_not_plain_names_its_field(entry, words):
    with pytest.raises(BadSampleError) as caught:
        to_conversation(entry)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "extra",
    [
        {"video_id": "v1", "video_fps": 8, "duration": 3.0, "image_size": [336, 336]},
        {"id": "coco/1.jpg", "data_source": "a.mp4", "video_url": "https://host/a.mp4"},
        {"note": "see a.mp4\nfor more", "metadata": {"dataset": "x", "frames": 16}},
    ],
)
def test_facts_about_a_visual_are_no_visual(extra):
    entry = {"conversations": ASKED, "video": "a.mp4", **extra}
    assert to_conversation(entry) == entry


def test_the_name_of_an_entry_is_no_visual():
    entry = {"id": "coco/1.jpg", "sample_id": "2.mp4", "source": "a.mp4", **TALK}
    assert to_conversation(entry) == entry


def test_a_field_can_be_ignored():
    entry = {"conversations": ASKED, "video": "a.mp4", "thumb_image": "x.jpg", "images": ["y.jpg"]}
    assert to_conversation(entry, ["thumb_image", "images"]) == entry


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("media")
    pictures = draw_frames(3, 16)[0]  # 8 frames per second
    (root / "a.mp4").write_bytes(encode_video(pictures))
    (root / "b.jpg").write_bytes(encode_image(pictures[0]))
    return root


def samples(folder: Path) -> list[dict]:
    manifest = read_manifest(str(folder))
    reader = ShardReader(manifest, 30.0)
    raw = [untar_sample(reader.read(0, n), "") for n in range(len(manifest))]
    reader.close()
    return raw


def test_they_are_packed_and_read(media, tmp_path):
    """No row lacks a visual: it has as many visuals as the entry names."""
    entries = [entry for entry, _ in READ.values()]
    assert pack(tmp_path, media, entries, lines=True) == 0
    frames, encoder = FrameReader(32, UniformSampler(2)), ConversationEncoder()
    for raw, (_, expected) in zip(samples(tmp_path / "out"), READ.values(), strict=True):
        sample = decode_sample({"__url__": "", **raw}, frames, encoder)
        assert len(sample.visuals) == (2 if expected is BOTH else 1)


def test_a_field_that_is_ignored_on_the_command_line(media, tmp_path, capsys):
    entry = {"conversations": ASKED, "video": "a.mp4", "cover_image": "x.jpg"}
    assert pack(tmp_path, media, [entry]) == 1
    assert "'cover_image'" in " ".join(capsys.readouterr().out.split())
    assert pack(tmp_path, media, [entry], "--overwrite", "--ignore-field", "cover_image") == 0
    assert json.loads(samples(tmp_path / "out")[0]["json"]) == entry


@pytest.mark.parametrize(
    ("span", "first", "count"),
    [
        ({"start": 0.5}, 4, 12),  # 16 frames at 8 per second
        ({"start": 0.5, "end": None}, 4, 12),
        ({"end": 0.5}, 0, 4),
        ({"start": None, "end": "0.5"}, 0, 4),
        ({"start": 0.5, "end": 1.0}, 4, 4),
        ({"start": 0}, 0, 16),
        ({"start": None, "end": None}, 0, 16),
    ],
)
def test_a_part_of_a_video_with_one_end(media, tmp_path, span, first, count):
    entry = {"conversations": ASKED, "video": "a.mp4", **span}
    assert pack(tmp_path, media, [entry], "--reencode", "64") == 0
    every = FrameReader(64, FpsSampler(100.0, 100))
    part = every.video(samples(tmp_path / "out")[0]["mp4"])
    whole = every.video((media / "a.mp4").read_bytes())
    assert len(part) == count
    assert (part.float() - whole[first : first + count].float()).abs().mean() < 3


@pytest.mark.parametrize(
    "span", [{"start": -1}, {"end": 0}, {"start": 2, "end": 1}, {"start": "x"}, {"end": "inf"}]
)
def test_a_part_that_is_none(media, tmp_path, capsys, span):
    entry = {"conversations": ASKED, "video": "a.mp4", **span}
    assert pack(tmp_path, media, [entry], "--reencode", "64") == 1
    assert "bad_field" in capsys.readouterr().out
