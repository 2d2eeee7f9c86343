"""Fields that shards do not have: none is ignored if ignoring it would train a sample wrongly."""

import pytest

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.fields import words_of
from datamodules.shards.annotations.formats import to_conversation
from tests.datamodules.shards.test_annotations import pack, turns
from tests.datamodules.shards.test_dialects import ASKED, TALK, messages, part


def refused(entry: dict, *words: str, ignored: tuple[str, ...] = ()) -> None:
    with pytest.raises(BadSampleError) as caught:
        to_conversation(entry, ignored)
    for word in ("bad_field", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("video_paths", ["video", "path"]),
        ("videoPath2", ["video", "path", "2"]),
        ("VIDEO", ["video"]),
        ("HTMLClips", ["html", "clip"]),
        ("vid", ["vid"]),
        ("start_s", ["start", "s"]),
        ("fps_ms_ids", ["fps", "ms", "id"]),
        ("", []),
    ],
)
def test_words_of_a_name(name, words):
    assert words_of(name) == words


@pytest.mark.parametrize(
    "name",
    [
        "video_name",
        "videoName",
        "video_id",
        "vid",
        "VIDEO",
        "clip",
        "image_base64",
        "pic_2",
        "media",
    ],
)
def test_a_text_under_a_visual_name_is_no_visual(name):
    for value in ("a", "/9j/4AAQSkZJRg" * 40, ["a", "b"], {"name": "a"}):
        refused({**TALK, name: value}, f"{name!r} names ", f"--ignore-field {name}")
        assert to_conversation({**TALK, name: value}, [name])[name] == value
    for value in (None, "", " ", [], 3, [336, 336], {"width": 3}):
        assert to_conversation({**TALK, name: value})[name] == value


@pytest.mark.parametrize("name", ["video_id", "videoId", "clip_id", "video_name", "image_caption"])
def test_beside_a_visual_it_is_a_fact(name):
    entry = {"conversations": ASKED, "video": "a.mp4", name: "v_a"}
    assert to_conversation(entry) == entry
    assert to_conversation({**entry, "video_id": "a.mp4"})["video"] == "a.mp4"
    shown = {"messages": messages([part("video", "a.mp4"), part("text", "What is it?")], "A card.")}
    assert to_conversation({**shown, name: "v_a"})["video"] == "a.mp4"


@pytest.mark.parametrize(
    "extra", [{"media_type": "text"}, {"image_size": "3x3"}, {"videoFps": "8"}]
)
def test_facts_without_a_visual(extra):
    assert to_conversation({**TALK, **extra}) == {**TALK, **extra}
    (name,) = extra
    refused({**TALK, name: "a.mp4"}, f"{name!r} names a.mp4")


@pytest.mark.parametrize(
    "file", ["a.flv", "a.ogv", "d/a.WMV", "a.3gp", "a.bmp", "a.tiff", "a.heic"]
)
def test_endings_that_are_not_read(file):
    for name in ("clip", "file", "path"):
        refused({**TALK, name: file}, f"{name!r} names {file}")
        refused({**TALK, name: [{"path": file, "type": "video"}]}, f"{name!r} names {file}")
    refused({**TALK, "video": "a.mp4", "clip": file}, f"'clip' names {file}")
    for value in (f"see {file}", ".bmp", "bmp", f"https://host/{file}"):
        assert to_conversation({**TALK, "note": value})["note"] == value


def test_visuals_of_a_turn():
    for name in ("images", "image"):
        turn = {"role": "user", "content": "What?", name: ["a.jpg"]}
        refused({"messages": [turn, *messages("x", roles=("assistant",))]},
                f"{name!r} of messages 0 names a.jpg")  # fmt: skip
    asked = {**ASKED[0], "clip": "b.mp4"}
    refused({"conversations": [asked, ASKED[1]], "video": "a.mp4"}, "'clip' of conversations 0")
    said = {"conversations": turns("Run main.ts", "x")}  # a turn's text is not a field
    assert to_conversation(said) == said


TAGGED = {
    "Qwen-VL": (turns("Picture 1: <img>b.jpg</img>\nWhat?", "x"),
                "Picture 1: <image>\nWhat?", {"image": "b.jpg"}),
    "two": (turns("<img>b.jpg</img><img> d/c.PNG </img>Same?", "x"),
            "<image><image>Same?", {"image": ["b.jpg", "d/c.PNG"]}),
    "a video": (turns("<video>a.mp4</video>What?", "x"), "<video>What?", {"video": "a.mp4"}),
    "a folder": (turns("<video>v/a</video>What?", "x"), "<video>What?", {"video": "v/a"}),
    "both": (turns("<image>b.jpg</image><video>a.mp4</video>What?", "x"),
             "<image><video>What?", {"image": "b.jpg", "video": "a.mp4"}),
    "a file url": (turns("<img>file://b.jpg</img>What?", "x"), "<image>What?", {"image": "b.jpg"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAGGED)
def test_files_between_tags_are_read(name):
    said, asked, visuals = TAGGED[name]
    expected = {"conversations": turns(asked, "x"), **visuals}
    assert to_conversation({"conversations": said}) == expected
    assert to_conversation({"messages": messages(said[0]["value"], "x")}) == expected
    assert to_conversation({"query": said[0]["value"], "response": "x"}) == expected
    assert to_conversation({"conversations": said, **visuals}) == expected
    assert to_conversation({"messages": messages(said[0]["value"], "x"), **visuals}) == expected


def test_tags_that_hold_no_file():
    for said in ("<video></video>What?", "The tag <img>of a picture</img>?", "<img>"):
        entry = {"conversations": turns(said, "<img>x</img>"), "video": "a.mp4"}
        assert to_conversation(entry) == entry


def test_tags_that_are_refused():
    refused({"conversations": turns("<img>https://host/b.jpg</img>", "x")}, "<img>", "is a url")
    refused({"conversations": turns("<img>b.jpg</img>", "x"), "image": "c.jpg"}, "different files")
    refused({"conversations": turns("What?", "<img>b.jpg</img>")}, "answer conversations 1")


def test_a_picture_without_an_ending_is_named(tmp_path, capsys):
    entry = {"conversations": turns("<img>17</img>What?", "x")}
    assert pack(tmp_path, tmp_path, [entry]) == 1
    assert "unknown_format: 17" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["image", "image_url", "video"])
def test_a_visual_in_an_answer(kind):
    """Its slot would be trained as a word, and its visual would move before the question."""
    shown = [part(kind, "a.mp4"), part("text", "x")]
    refused({"messages": messages("What?", shown)}, "messages 1", repr(kind), "must be text")
    refused({"conversations": messages("What?", shown, names=("from", "value"))}, "conversations 1")
    asked = {"messages": messages(shown, [part("text", "x")])}
    assert to_conversation(asked)["conversations"][1] == {"from": "gpt", "value": "x"}


@pytest.mark.parametrize(("name", "value"), [("loss", False), ("loss_scale", 0.0), ("weight", 0)])
def test_answers_that_are_not_to_be_learnt(name, value):
    """From ms-swift and OpenAI."""
    for said, field in (
        (messages("a", "b", "c", "d"), "messages"),
        (turns("a", "b", "c", "d"), "conversations"),
    ):
        said[1][name], said[3][name] = value, 1
        refused({field: said}, f"{name!r} of {field} 1", f"--ignore-field {name}")
        assert len(to_conversation({field: said}, [name])["conversations"]) == 4
        said[1][name], said[0][name] = None, value  # questions never have labels
        assert len(to_conversation({field: said})["conversations"]) == 4


@pytest.mark.parametrize("name", ["kto_tag", "label"])
def test_bad_answers_are_not_learnt(name):
    """From LLaMA-Factory, ms-swift and TRL."""
    for entry in (TALK, {"messages": messages("a", "b")}, {"prompt": "a", "completion": "b"}):
        refused({**entry, name: False}, f"{name!r} is false", f"--ignore-field {name}")
        learnt = to_conversation(entry)["conversations"]
        assert to_conversation({**entry, name: False}, [name])["conversations"] == learnt
        for value in (True, None, 0, "false"):  # a class label of some data set
            assert to_conversation({**entry, name: value})["conversations"] == learnt


def test_an_ignored_mark_is_packed(tmp_path, capsys):
    entry = {**TALK, "label": False}
    assert pack(tmp_path, tmp_path, [entry]) == 1
    assert "'label'" in capsys.readouterr().out
    assert pack(tmp_path, tmp_path, [entry], "--overwrite", "--ignore-field", "label") == 0
