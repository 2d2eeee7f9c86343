"""The part of a video that an entry means, by the field names of published data sets."""

import json
import math

import pytest

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.spans import take_span
from datamodules.visuals.frames import FpsSampler, FrameReader
from tests.datamodules.shards.test_annotations import pack
from tests.datamodules.shards.test_dialects import ASKED, media, samples

__all__ = ["media"]
ENTRY = {"conversations": ASKED, "video": "a.mp4"}

PARTS = [
    ({"start": 0.5, "end": 1.0}, (0.5, 1.0)),
    ({"start_time": 0.5, "end_time": "1.0"}, (0.5, 1.0)),
    ({"startTime": 0.5, "endTime": 1}, (0.5, 1.0)),
    ({"video_start": 0.5, "video_end": 1.0}, (0.5, 1.0)),
    ({"video_start": 0.5}, (0.5, math.inf)),
    ({"begin": 0.5, "end": 1.0}, (0.5, 1.0)),
    ({"start_sec": 0.5, "end_sec": 1.0}, (0.5, 1.0)),
    ({"end_time": 1.0, "start_time": None}, (0.0, 1.0)),
    ({"span": [0.5, 1.0]}, (0.5, 1.0)),
    ({"clip": [0.5, 1]}, (0.5, 1.0)),
    ({"segment": ["0.5", "1"]}, (0.5, 1.0)),
    ({"timestamp": [0.5, 1]}, (0.5, 1.0)),
    ({"timestamps": [0.5, 1], "start": 0.5}, (0.5, 1.0)),
    ({"time_range": [0.5, 1]}, (0.5, 1.0)),
]


@pytest.mark.parametrize(("fields", "expected"), PARTS)
def test_what_is_plain_is_read(fields, expected):
    entry, span, named = take_span({**ENTRY, **fields})
    assert (entry, span) == (
        {**ENTRY, **{n: v for n, v in fields.items() if v is None}},
        expected,
    )
    assert named == [name for name, value in fields.items() if value is not None]
    assert take_span({**ENTRY, **fields}, list(fields)) == ({**ENTRY, **fields}, None, [])
    assert take_span({**fields, "image": "b.jpg"}) == ({**fields, "image": "b.jpg"}, None, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"start_frame": 5},
        {"end_frame": 8},
        {"start_idx": 0},
        {"start_ms": 500},
        {"clip_start": 0.5},
        {"segment": "0.5-1"},
        {"clip": "0:05 - 0:10"},
        {"timestamp": 3.0},
        {"timestamps": [0.5, 1.0, 1.5]},
        {"timestamps": [[0.5, 1.0]]},
        {"timestamps": ["00:00:01", "00:00:02"]},
        {"clips": [{"start": 1}]},
        {"start_time": "00:00:01"},
        {"video_start": True},
        {"span": [0.5, math.inf]},
    ],
)
def test_what_is_not_plain_names_its_field(fields):
    (name,) = fields
    with pytest.raises(BadSampleError) as caught:
        take_span({**ENTRY, **fields})
    for words in ("bad_field", repr(name), f"--ignore-field {name}"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert take_span({**ENTRY, **fields}, [name])[1] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"start": 0.5, "begin": 0.6}, "start and begin name different parts"),
        ({"end": 1, "span": [0.5, 2]}, "end and span name different parts"),
        ({"start_time": 2, "end_time": 1}, "start_time and end_time: start 2.0 and end 1.0"),
        ({"span": [1, 1]}, "span: start 1.0"),
        ({"span": [0.5, 1], "video": ["a.mp4", "b.mp4"]}, "'span'"),  # of which?
    ],
)
def test_parts_that_are_none(fields, words):
    with pytest.raises(BadSampleError, match=f"bad_field: {words}"):
        take_span({**ENTRY, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"duration": 2.0, "fps": 5, "video_id": "v_1", "clip_id": 3, "segment_id": "s"},
        {"segment": 3, "segment_idx": 2, "clip_index": 1, "video_segment": "intro"},
        {"clip": "v_a", "frame_interval": 4, "interval": 2, "video_clip": 3},
        {"frame_idx": [0, 4], "start_token": "<s>", "time": 3, "seconds": 2, "timing": [0, 1]},
        {"start": 0, "end": None, "span": [], "segment": ""},
    ],
)
def test_facts_about_a_video_name_no_part(fields):
    assert take_span({**ENTRY, **fields}) == ({**ENTRY, **fields}, None, [])


@pytest.mark.parametrize("fields", [PARTS[1][0], PARTS[3][0], PARTS[5][0], PARTS[9][0]])
def test_it_is_cut_out(media, tmp_path, capsys, fields):
    entry = {**ENTRY, **fields}
    assert pack(tmp_path, media, [entry]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("part_of_video", *fields, "a.mp4", "--reencode"):
        assert words in shown
    assert pack(tmp_path, media, [entry], "--reencode", "64", "--overwrite") == 0
    (raw,) = samples(tmp_path / "out")
    assert json.loads(raw["json"]) == ENTRY
    every = FrameReader(64, FpsSampler(100.0, 100))
    assert len(every.video(raw["mp4"])) == 4  # half a second at 8 per second, without its end
    ignored = [word for name in fields for word in ("--ignore-field", name)]
    assert pack(tmp_path, media, [entry], "--overwrite", *ignored) == 0
    (raw,) = samples(tmp_path / "out")
    assert json.loads(raw["json"]) == entry
    assert len(every.video(raw["mp4"])) == 16
