"""`ropelab-shards`: packing, refusals of packing, and verifying."""

import errno
import io
import json

import av
import pytest

from datamodules.shards.synthetic import (
    draw_frames,
    encode_image,
    encode_video,
    prepare_shards,
    write_shards,
)
from datamodules.stream.index import index_path, read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from experiments.shards import main


def entry(text: str = "<video>\nWhat is it?", **fields) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a square"}]
    return {"id": "x", "conversations": turns, **fields}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for n in range(5):
        (folder / "sub" / f"{n}.mp4").write_bytes(encode_video(draw_frames(n, 8)[0]))
    (folder / "a.jpg").write_bytes(encode_image(draw_frames(9, 1)[0][0]))
    (folder / "broken.mp4").write_bytes(b"no video" * 50)
    return folder


GOOD = [
    entry(video="sub/0.mp4"),
    entry("<image>\nWhat is it?", video="sub/1.mp4"),
    entry("<image>\nWhat is it?", image="a.jpg", source="somewhere"),
    entry("Compare <image> and <video>.", image=["a.jpg"], video=["sub/2.mp4"]),
    entry("No picture at all"),
    entry("<video><video>", video=["sub/3.mp4", "sub/4.mp4"]),
]


def pack(videos, entries, *options: str, name: str = "out") -> tuple[int, list]:
    annotations = videos.parent / "annotations.json"
    annotations.write_text(json.dumps(entries))
    output = videos.parent / name
    code = main(
        [
            *("pack", "--videos", str(videos), "--annotations", str(annotations)),
            *("--output", str(output), *options),
        ]
    )
    return code, sorted(output.glob("*"))


def read_all(paths) -> list[dict]:
    manifest = read_manifest([str(path) for path in paths if path.suffix == ".tar"])
    reader = ShardReader(manifest, 30.0)
    raw = [
        untar_sample(reader.read(n, i), "")
        for n, shard in enumerate(manifest.shards)
        for i in range(shard.count)
    ]
    reader.close()
    return raw


def test_what_is_packed_comes_out_again(videos):
    code, files = pack(videos, GOOD, "--shard-size", "4", "--workers", "1")
    assert code == 0
    assert [path.name for path in files] == [
        "shard-000000.tar", "shard-000000.tar.idx", "shard-000001.tar", "shard-000001.tar.idx",
    ]  # fmt: skip
    raw = read_all(files)
    assert [json.loads(sample["json"]) for sample in raw] == GOOD
    assert raw[0]["mp4"] == (videos / "sub" / "0.mp4").read_bytes()
    assert raw[3]["0.jpg"] == (videos / "a.jpg").read_bytes()
    assert raw[3]["1.mp4"] == (videos / "sub" / "2.mp4").read_bytes()
    assert main(["verify", str(files[0].parent), "--workers", "1"]) == 0


def test_processes_change_nothing(videos):
    one = pack(videos, GOOD, "--shard-size", "2", "--workers", "1", name="one")[1]
    two = pack(videos, GOOD, "--shard-size", "2", "--workers", "2", name="two")[1]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_json_lines(videos):
    lines = videos.parent / "a.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in GOOD) + "\n\n")
    output = videos.parent / "out"
    arguments = ["pack", "--videos", str(videos), "--annotations", str(lines)]
    assert main([*arguments, "--output", str(output), "--workers", "1"]) == 0
    assert len(read_all(output.glob("*.tar"))) == len(GOOD)


def test_bad_entries_are_left_out_and_reported(videos, capsys):
    bad = [
        entry(video="sub/absent.mp4"),
        entry(video="broken.mp4"),
        entry(image="a.jpg"),
        entry(),
        entry(video="../annotations.mp4"),
        entry(video="a.exe"),
        entry(video=7),
        {"id": "y"},
        "no entry",
    ]
    code, files = pack(videos, [GOOD[0], *bad, GOOD[4]], "--workers", "1")
    assert code == 1
    assert [sample["__key__"] for sample in read_all(files)] == ["000000000", "000000010"]
    shown = capsys.readouterr().out
    for reason in (
        "file_missing", "video_unreadable", "not_a_video", "slot_mismatch", "unsafe_path",
        "unknown_format", "bad_field", "missing_field",
    ):  # fmt: skip
        assert reason in shown
    assert "entry 1 (x)" in shown
    assert "broken.mp4: " in shown


def test_reencoding_makes_small_frames_with_keyframes_close_by(videos):
    (videos / "wide.mp4").write_bytes(
        encode_video([frame.resize((320, 180)) for frame in draw_frames(1, 30, 180)[0]], gop=250)
    )
    code, files = pack(videos, [entry(video="wide.mp4")], "--reencode", "90")
    assert code == 0
    with av.open(io.BytesIO(read_all(files)[0]["mp4"]), "r") as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height) == (160, 90)
        packets = [packet for packet in video.demux(stream) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [n % 8 == 0 for n in range(30)]
        assert float((packets[-1].pts or 0) * (stream.time_base or 0)) == pytest.approx(
            29 / 8
        )  # same times


def test_users_mistakes_are_one_line(videos, capsys, tmp_path):
    lines = tmp_path / "bad.jsonl"
    lines.write_text('\n{"id": \n{\n')
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "nothing.json").write_text("[]")
    pack(videos, GOOD[4:5], "--workers", "1")
    capsys.readouterr()
    where = ["--output", str(tmp_path / "o")]
    for arguments, advice in (
        (["pack", "--videos", "/nowhere", "--annotations", str(lines), *where], "--videos"),
        (["pack", "--videos", str(videos), "--annotations", str(lines), *where], "line 2"),
        (["pack", "--videos", str(videos), "--annotations", "/no.json", *where], "cannot be read"),
        (["pack", "--videos", str(videos), "--annotations", str(tmp_path / "object.json"), *where],
         "a list of entries"),
        (["pack", "--videos", str(videos), "--annotations", str(tmp_path / "nothing.json"), *where],
         "no entry"),
        (["pack", "--videos", str(videos), "--annotations", str(videos.parent / "annotations.json"),
          "--output", str(videos.parent / "out")], "--overwrite"),
        (["verify", str(tmp_path / "no-*.tar")], "no file matches"),
        (["verify", str(videos)], "no .tar file"),
        (["verify", "nowhere://bucket/a.tar"], "Protocol not known"),
    ):  # fmt: skip
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert advice in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["pack", "--shard-size", "0"])
    assert "Traceback" not in capsys.readouterr().err


def test_overwriting_leaves_no_shard_of_before(videos):
    pack(videos, GOOD, "--shard-size", "1", "--workers", "1")
    code, files = pack(videos, GOOD, "--workers", "1", "--overwrite")
    assert code == 0
    assert [path.name for path in files] == ["shard-000000.tar", "shard-000000.tar.idx"]


def test_a_write_that_fails_leaves_nothing(videos, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, files = pack(videos, GOOD, "--workers", "1")
    assert code == 2
    assert files == []


def test_a_full_disk_is_named_by_the_shard(tmp_path, monkeypatch):
    """A write gets no file name, so its error has none."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/a/shard-000000.tar'"):
            prepare_shards(tmp_path / "shards", {"a": [2]})
    monkeypatch.setattr("datamodules.stream.index._store", lambda *_: False)
    with pytest.raises(OSError, match=r"cannot be written: '.*/shard-000000.tar.idx'"):
        prepare_shards(tmp_path / "shards", {"a": [2]})


def test_verify_reports_every_bad_sample(tmp_path, capsys):
    paths = write_shards(tmp_path, [6, 5, 4, 3])
    assert main(["verify", str(tmp_path), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"good": 18, "bad": {}, "items": []}

    data = bytearray(paths[0].read_bytes())
    at = data.index(b"ftyp")  # in the first video
    data[at - 4 : at + 400] = bytes(404)
    paths[0].write_bytes(bytes(data))
    ends = read_manifest(str(paths[1])).shards[0].read_offsets()[1:]
    paths[1].write_bytes(paths[1].read_bytes()[:-20_480])
    paths[2].write_bytes(b"")
    index_path(paths[3]).write_bytes(index_path(paths[3]).read_bytes()[:-8])
    missing = str(tmp_path / "missing.tar")
    assert main(["verify", str(tmp_path), missing, "--json", "--workers", "2"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"good", "bad", "items"}
    items = [(item["shard"], item["key"], item["reason"]) for item in report["items"]]
    assert items[0] == (str(paths[0]), "000000000", "video_unreadable")
    assert (str(paths[1]), "", "tar_truncated") in items
    assert (str(paths[2]), "", "tar_empty") in items
    assert (str(paths[3]), "", "index_stale") in items
    assert items[-1] == (missing, "", "shard_missing")
    assert sum(report["bad"].values()) == len(items)
    left = sum(end <= paths[1].stat().st_size for end in ends)
    assert 0 < left < 5
    assert report["good"] == 5 + left + 3
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 1
    assert "video_unreadable: mp4: " in capsys.readouterr().out
