"""Published annotation formats: each is converted to the format of shards, field by field."""

import json
from pathlib import Path

import pytest

from datamodules.batch import VISUAL_SLOT
from datamodules.errors import BadSampleError
from datamodules.instruct import decode_sample
from datamodules.sample.conversation import ConversationEncoder, parse_sample
from datamodules.shards.annotations.files import read_annotations
from datamodules.shards.annotations.formats import to_conversation
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from experiments.shards import main


def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


LLAVA_15 = [
    {
        "id": "000000033471",
        "image": "coco/train2017/33471.jpg",
        "conversations": turns("<image>\nWhat is it?", "A bus.", "And its colour?", "Red."),
    },
    {"id": "wgByO4Y_0", "model": "", "conversations": turns("Which is larger?", "The second.")},
]
LLAVA_VIDEO = [
    {
        "id": "1006-8968804598",
        "conversations": turns("<image>\nWhy?\nA. x.\nB. y.\nAnswer with the letter.", "B."),
        "data_source": "0_30_s_nextqa",
        "video": "NextQA/NExTVideo/1006/1.mp4",
    }
]
M4_INSTRUCT = [
    {
        "sample_id": "HQ-Edit_1",
        "conversations": turns("<image>\n<image>\nWhat was changed?", "The sky."),
        "image": ["HQ-Edit/1_in.jpg", "HQ-Edit/1_out.jpg"],
        "choice_list": None,
        "metadata": {"dataset": "HQ-Edit", "split": "train", "num_sample": 50000},
    },
    {"sample_id": "v", "conversations": turns("<image>\nDescribe.", "A card."), "video": "raw/9"},
]
HOUND_SFT = [
    {"id": "v_a_0", "video": "frames/v_a", "conversations": turns("<video>\nWhat?", "A card.")}
]
HOUND_DPO = [
    {
        "id": "v_a_1",
        "video": "frames/v_a",
        "prompt": "What moves?",
        "answer": "A red card.",
        "chosen": "A card moves.",
        "rejected": "Nothing does.",
        "chosen_score": 5,
        "rejected_score": 2,
    }
]
VIDEOCHAT2 = [
    {
        "video": "webvid/1.mp4",
        "QA": [
            {"i": "Answer in a word.", "q": "What is it?", "a": "A card."},
            {"i": "Answer in a word.", "q": "What colour?", "a": "Red."},
        ],
    },
    {"video": "youcook2/1.mp4", "QA": [{"i": "Describe the clip.", "q": "", "a": "A card."}],
     "start": 0.5, "end": 1.5},
    {"image": "chart.png", "QA": [{"i": "", "q": "How many?", "a": "The answer is 16."}]},
]  # fmt: skip
ALL = [*LLAVA_15, *LLAVA_VIDEO, *M4_INSTRUCT, *HOUND_SFT, *HOUND_DPO, *VIDEOCHAT2]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("media")
    pictures = draw_frames(3, 16)[0]  # 8 frames per second
    video, image = encode_video(pictures), encode_image(pictures[0])
    for name in ("NextQA/NExTVideo/1006/1.mp4", "webvid/1.mp4", "youcook2/1.mp4", "raw/9.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(video)
    for name in ("coco/train2017/33471.jpg", "HQ-Edit/1_in.jpg", "HQ-Edit/1_out.jpg", "chart.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    (root / "frames" / "v_a").mkdir(parents=True)
    for number, picture in enumerate(pictures[:6]):
        (root / f"frames/v_a/c01_{number:04d}.jpeg").write_bytes(encode_image(picture))
    (root / "frames/v_a/notes.txt").write_text("no frame")
    return root


def pack(folder: Path, media: Path, entries: list, *options: str, lines: bool = False):
    path = folder / ("a.jsonl" if lines else "a.json")
    text = "\n".join(json.dumps(e) for e in entries) if lines else json.dumps(entries)
    path.write_text(text)
    where = ["--annotations", str(path), "--output", str(folder / "out"), "--workers", "1"]
    return main(["pack", "--videos", str(media), *where, *options])


@pytest.fixture(scope="module")
def packed(media, tmp_path_factory) -> list[dict]:
    """Returns the raw samples of `ALL`."""
    folder = tmp_path_factory.mktemp("packed")
    assert pack(folder, media, ALL, "--reencode", "64", lines=True) == 0
    assert main(["verify", str(folder / "out"), "--workers", "1"]) == 0
    reader = ShardReader(read_manifest(str(folder / "out")), 30.0)
    samples = [untar_sample(reader.read(0, n), "") for n in range(len(ALL))]
    reader.close()
    return samples


def of(packed: list[dict], entry: dict) -> dict:
    return packed[ALL.index(entry)]


def test_conversations_stay_as_they_are(packed):
    for entry in (*LLAVA_15, *LLAVA_VIDEO, *M4_INSTRUCT, *HOUND_SFT):
        assert json.loads(of(packed, entry)["json"]) == entry


def test_every_sample_is_read(packed):
    """From the shard to ids and frames, with visuals in the order of their slots."""
    frames, encoder = FrameReader(32, UniformSampler(2)), ConversationEncoder()
    visuals = []
    for raw in packed:
        if "chosen" in json.loads(raw["json"]):
            continue
        sample = decode_sample({"__url__": "", **raw}, frames, encoder)
        assert sample.text.input_ids.count(VISUAL_SLOT) == len(sample.visuals)
        visuals.append([len(visual.frames) for visual in sample.visuals])
    assert visuals == [[1], [], [2], [1, 1], [2], [2], [2], [2], [1]]


def test_a_pair_is_a_prompt_and_two_answers(packed):
    raw = of(packed, HOUND_DPO[0])
    assert json.loads(raw["json"]) == {
        "id": "v_a_1",
        "video": "frames/v_a",
        "conversations": turns("<video>\nWhat moves?"),
        "chosen": "A card moves.",
        "rejected": "Nothing does.",
        "chosen_score": 5,
        "rejected_score": 2,
    }
    assert raw["mp4"]


@pytest.mark.parametrize("prompt", ["<video>\nWhat?", "What?\n<video>", "What?", "<image>What?"])
def test_the_video_stands_before_the_prompt(prompt):
    entry = to_conversation({"video": "a.mp4", "prompt": prompt, "chosen": "x", "rejected": "y"})
    assert entry["conversations"] == turns("<video>\nWhat?")


def test_a_pair_may_be_given_as_turns():
    """Trainers that read ShareGPT's format use it. The format of shards is read as well."""
    entry = {
        "video": "a.mp4",
        "conversations": turns("<video>\nWhat?"),
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
        "reference": {"chosen": -1.5, "rejected": -2.0},
    }
    own = to_conversation(entry)
    assert (own["chosen"], own["rejected"]) == ("x", "y")
    assert own["reference"] == entry["reference"]
    assert to_conversation(own) == own


def test_videochat2_says_its_instruction_once(packed):
    assert json.loads(of(packed, VIDEOCHAT2[0])["json"]) == {
        "video": "webvid/1.mp4",
        "conversations": turns(
            "<video>\nAnswer in a word.\nWhat is it?", "A card.", "What colour?", "Red."
        ),
    }
    captioned = json.loads(of(packed, VIDEOCHAT2[1])["json"])
    assert captioned["conversations"] == turns("<video>\nDescribe the clip.", "A card.")
    pictured = json.loads(of(packed, VIDEOCHAT2[2])["json"])
    assert pictured["conversations"] == turns("<image>\nHow many?", "The answer is 16.")


def test_a_part_of_a_video_is_cut_out(packed, media, tmp_path, capsys):
    """Of 16 frames at 8 per second, those from 0.5 s to before 1.5 s are 8, from number 4 on."""
    every = FrameReader(64, FpsSampler(100.0, 100))
    raw = of(packed, VIDEOCHAT2[1])
    whole = every.video(of(packed, VIDEOCHAT2[0])["mp4"])
    assert len(whole) == 16
    part = every.video(raw["mp4"])
    assert len(part) == 8
    difference = (part.float() - whole[4:12].float()).abs().mean()
    assert difference < 3 < (part.float() - whole[:8].float()).abs().mean()
    assert not {"start", "end"} & json.loads(raw["json"]).keys()
    assert pack(tmp_path, media, VIDEOCHAT2[1:2]) == 1
    assert "part_of_video" in capsys.readouterr().out


def test_a_folder_of_frames_becomes_a_video(packed, media):
    frames = FrameReader(64, FpsSampler(2.0, 100)).video(of(packed, HOUND_SFT[0])["mp4"])
    reader = FrameReader(64, UniformSampler(1))
    stills = [
        reader.image(path.read_bytes())[0] for path in sorted(media.glob("frames/v_a/*.jpeg"))
    ]
    assert len(frames) == 6
    for frame, still in zip(frames, stills, strict=True):
        assert (frame.float() - still.float()).abs().mean() < 6


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"video": "a.mp4", "prompt": "x", "chosen": "y"}, "missing_field: rejected"),
        ({"video": "a.mp4", "chosen": "y", "rejected": "z"}, "missing_field: prompt"),
        ({"prompt": "x", "chosen": " ", "rejected": "z"}, "empty_conversation: chosen"),
        ({"prompt": "x", "chosen": 1, "rejected": "z"}, "bad_field: chosen"),
        ({"video": "a.mp4", "QA": []}, "empty_conversation"),
        ({"video": "a.mp4", "QA": [{"q": "x"}]}, "missing_field: a"),
        ({"video": "a.mp4", "QA": ["x"]}, "bad_field: QA 0"),
        ({"QA": [{"q": "x", "a": "y"}, {"i": "", "q": "", "a": "z"}]}, "missing_field: q of QA 1"),
        ([], "missing_field"),
    ],
)
def test_what_an_entry_lacks_is_said(entry, reason):
    with pytest.raises(BadSampleError, match=reason):
        to_conversation(entry)


def test_a_line_is_named(media, tmp_path, capsys):
    """Blank lines count. A line may contain characters that some readers take for a line end."""
    good = {"conversations": turns("What\u2028?", "x")}
    bad = {"id": "b", "video": "absent.mp4", "conversations": turns("<video>", "x")}
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good, ensure_ascii=False)}\n\n{json.dumps(bad)}\n")
    assert [a.where for a in read_annotations(path)] == ["line 1", "line 3"]
    where = ["--annotations", str(path), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(["pack", "--videos", str(media), *where]) == 1
    assert "line 3 (b)" in capsys.readouterr().out


def test_a_pair_with_a_visual_too_many_is_left_out(media, tmp_path, capsys):
    entry = {**HOUND_DPO[0], "conversations": turns("What moves?")}
    assert pack(tmp_path, media, [entry]) == 1
    assert "slot_mismatch" in capsys.readouterr().out


def test_verify_reads_both_answers(media, tmp_path, capsys):
    assert pack(tmp_path, media, HOUND_DPO) == 0
    assert main(["verify", str(tmp_path / "out"), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["good"] == 1
    raw = {"json": json.dumps({"conversations": turns("<video>"), "chosen": "x"}).encode()}
    with pytest.raises(BadSampleError):
        parse_sample(raw)  # a prompt without an answer cannot be trained on
