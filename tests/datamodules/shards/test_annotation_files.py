"""Annotation files as editors, pandas and Windows write them."""

import gzip
import json
from pathlib import Path

import pytest

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.files import parse_json, read_annotations
from datamodules.stream.index import read_manifest
from experiments.shards import main
from tests.datamodules.shards.test_annotations import turns

ENTRIES = [{"id": n, "conversations": turns("Wo ist „é“?", "x")} for n in range(3)]
LINES = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES)
LIST = json.dumps(ENTRIES, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("a.json", LIST, "entry 0"),
        ("a.jsonl", LINES, "line 1"),
        ("a.jsonl", LINES + "\n\n", "line 1"),
        ("a.jsonl", LIST, "entry 0"),  # a list, in spite of its name
        ("a.json", LINES, "line 1"),  # lines, in spite of its name
        ("a.JSONL", LINES, "line 1"),
        ("a.ndjson", LINES, "line 1"),
        ("a.txt", LINES, "line 1"),
        ("a.txt", LIST, "entry 0"),
    ],
)
def test_files_are_known_by_what_they_hold(tmp_path, encoding, ends, name, text, first):
    path = tmp_path / name
    path.write_bytes(text.replace("\n", ends).encode(encoding))
    read = read_annotations(path)
    assert [annotation.entry for annotation in read] == ENTRIES
    assert read[0].where == first


def test_one_entry_alone(tmp_path):
    for indent in (None, 1):
        for name in ("a.json", "a.jsonl"):
            if indent and name == "a.jsonl":
                continue
            (tmp_path / name).write_text(json.dumps(ENTRIES[0], indent=indent))
            assert [a.entry for a in read_annotations(tmp_path / name)] == ENTRIES[:1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(LINES.encode()), "gzip"),
        (b"PK\3\4....", "zip archive"),
        (b"PAR1....", "Parquet"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b'{"data": [{}], "n": 1}', "write only the list 'data'"),
        (b"7", "a list of entries"),
        (b"", "Expecting value"),
        (b'[{"a": 1},\n {"a": }]', "line 2, character 8"),
        (b'["\xff"]', "not UTF-8: byte 0xff at 2"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_what_is_none_is_said(tmp_path, data, words):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_bad_line_is_one_bad_entry(tmp_path, capsys):
    lines = [line.encode() for line in LINES.split("\n")]
    bad = [b'{"id": 9,', b'{"id": "\xff"}', b'{"id": 1, "id": 2}', b'{"x": Infinity}', b"[" * 9999]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([lines[0], *bad, lines[1], b"", lines[2]]))
    output = ["--output", str(tmp_path / "out"), "--workers", "1"]
    arguments = ["pack", "--videos", str(tmp_path), "--annotations", str(path), *output]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert shown.count(": bad_json: ") == 5
    for number in range(2, 7):
        assert f"[line {number}]: bad_json" in shown
    assert "'id' appears twice" in shown
    assert len(read_manifest(str(tmp_path / "out"))) == 3


def test_a_file_without_a_good_line_is_no_annotation(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\nid,video\n1,a.mp4\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: Expecting value"):
        read_annotations(path)
    path.write_text("")
    assert read_annotations(path) == []


def test_nan_is_a_value_that_is_missing():
    """As pandas writes it: a column of pictures in which some rows have none."""
    assert parse_json(b'{"image": NaN, "score": [NaN, 1]}') == {"image": None, "score": [None, 1]}
    for text in (b"Infinity", b"-Infinity"):
        with pytest.raises(BadSampleError, match="bad_json"):
            parse_json(text)


def test_numbers_beyond_float_are_not_packed(tmp_path, capsys):
    path: Path = tmp_path / "a.json"
    text = json.dumps(ENTRIES).replace('"id": 1', '"id": 1e999')
    path.write_text(text)
    output = ["--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(["pack", "--videos", str(tmp_path), "--annotations", str(path), *output]) == 1
    assert "bad_field" in capsys.readouterr().out
    assert len(read_manifest(str(tmp_path / "out"))) == 2


def test_a_field_twice_with_the_same_value_is_one():
    assert parse_json(b'{"a": 1, "a": 1}') == {"a": 1}
    with pytest.raises(BadSampleError, match="'a' appears twice"):
        parse_json(b'{"x": {"a": 1, "a": 2}}')
