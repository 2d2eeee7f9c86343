"""Tars as people make them: with sidecars, links, dots in keys, and members in another order."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from datamodules.errors import BadSampleError
from datamodules.file_names import is_sidecar, natural_key
from datamodules.sample.conversation import parse_sample
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from datamodules.stream.index import index_path, read_manifest, write_index
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import sample_offsets, untar_sample
from experiments.shards import main

VIDEO = encode_video(draw_frames(0, 4)[0])
TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A card."}]
TEXT = json.dumps({"conversations": TURNS}).encode()


def write(path: Path, names: list[str], links: dict[str, bytes] | None = None) -> Path:
    """Returns a tar of members in this order. `links`: types of members that are not files."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            if kind := (links or {}).get(name):
                info.type, info.linkname = kind, "/data/x.mp4"
                tar.addfile(info)
                continue
            data = TEXT if name.endswith(".json") else VIDEO
            if is_sidecar(name):
                data = b"\0\5\x16\7Mac OS X"
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> tuple[list, list[str]]:
    """Returns the members or the fault of each sample, and the faults of the shard."""
    manifest = read_manifest(str(path))
    reader, samples = ShardReader(manifest, 30.0), []
    for n in range(manifest.shards[0].count):
        try:
            raw = untar_sample(reader.read(0, n), str(path))
            parse_sample(raw)
            samples.append((raw["__key__"], sorted(raw.keys() - {"__key__", "__url__"})))
        except BadSampleError as error:
            samples.append(str(error))
    reader.close()
    return samples, [str(fault) for fault in manifest.faults]


def verify(path: Path, capsys) -> dict:
    code = main(["verify", str(path), "--json", "--workers", "1"])
    report = json.loads(capsys.readouterr().out)
    assert code == bool(report["bad"])
    return report


@pytest.mark.parametrize(
    "sidecars",
    [
        ["d/._k1.json", "d/._k1.mp4", "d/._k2.json", "d/._k2.mp4"],
        ["d/.DS_Store", "d/Thumbs.db", "d/desktop.ini", "d/THUMBS.DB"],
        ["__MACOSX/d/k1.json", "__MACOSX/d/._k1.mp4", "__MACOSX/._d", "d/__MACOSX/k1.mp4"],
    ],
)
def test_sidecars_are_no_members(tmp_path, capsys, sidecars):
    """Each stands before a member of a sample, where it once cut that sample in two."""
    members = ["d/k1.json", "d/k1.mp4", "d/k2.json", "d/k2.mp4"]
    names = [name for pair in zip(sidecars, members, strict=True) for name in pair]
    path = write(tmp_path / "a.tar", [*names, "d/._z.mp4"])
    assert read(path) == ([("d/k1", ["json", "mp4"]), ("d/k2", ["json", "mp4"])], [])
    with tarfile.open(path) as tar:
        starts = {member.name: member.offset for member in tar}
    offsets = read_manifest(str(path)).shards[0].read_offsets()
    assert list(offsets)[:2] == [starts["d/k1.json"], starts["d/k2.json"]]
    assert verify(path, capsys)["good"] == 2


def test_an_index_that_counts_sidecars_says_so(tmp_path, capsys):
    """As `energon prepare` makes it."""
    path = write(tmp_path / "a.tar", ["d/._k1.json", "d/k1.json", "d/k1.mp4"])
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar][:2]
        end = tar.offset
    write_index([*starts, end], [index_path(path)])
    samples, _ = read(path)
    assert "index_stale" in samples[0]
    assert samples[1] == ("d/k1", ["json", "mp4"])
    assert verify(path, capsys)["bad"] == {"index_stale": 1}


def test_members_sorted_by_type(tmp_path, capsys):
    """Without `tar --sort`, all .json come first. The message has the remedy."""
    path = write(tmp_path / "a.tar", ["k1.json", "k2.json", "k1.mp4", "k2.mp4"])
    samples, faults = read(path)
    assert len(faults) == 1
    for words in ("tar_unsorted", "'k1'", ".json, .mp4", "1 more", "tar --sort=name"):
        assert words in faults[0]
    assert not index_path(path).exists()
    assert "slot_mismatch" in samples[0]
    assert "missing_field" in samples[2]
    assert "only .mp4:" in samples[2]
    assert all("tar --sort=name" in sample for sample in samples)
    report = verify(path, capsys)
    assert report["bad"] == {"tar_unsorted": 1, "slot_mismatch": 2, "missing_field": 2}


def test_the_advice_for_unsorted_members_helps(tmp_path):
    for name in ("k2.mp4", "k1.json", "k2.json", "k1.mp4"):
        (tmp_path / name).write_bytes(TEXT if name.endswith("json") else VIDEO)
    tar = ["tar", "-C", str(tmp_path), "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*tar, "--sort=name", "."], check=True)
    samples, faults = read(tmp_path / "a.tar")
    assert not faults
    assert samples == [("./k1", ["json", "mp4"]), ("./k2", ["json", "mp4"])]


def test_samples_of_the_same_name_are_no_disorder(tmp_path):
    """Concatenated shards, in which the keys start again."""
    names = ["k1.json", "k1.mp4", "k2.json", "k2.mp4", "k1.json", "k1.mp4"]
    samples, faults = read(write(tmp_path / "a.tar", names))
    assert not faults
    assert len(samples) == 3


def test_keys_with_dots(tmp_path, capsys):
    """WebDataset ends a key at the first dot, so two samples become one."""
    names = ["v_1.2_a.json", "v_1.2_a.mp4", "v_1.2_b.json", "v_1.2_b.mp4", "w.json", "w.mp4"]
    path = write(tmp_path / "a.tar", names)
    (first, second), faults = read(path)
    assert not faults
    for words in ("missing_field", "no .json", ".2_a.json, .2_a.mp4", "first dot"):
        assert words in first
    assert second == ("w", ["json", "mp4"])
    assert verify(path, capsys)["bad"] == {"missing_field": 1}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a symbolic link to /data/x.mp4"),
        (tarfile.LNKTYPE, "a hard link to /data/x.mp4"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a named pipe"),
    ],
)
def test_links_and_devices_are_counted(tmp_path, capsys, kind, words):
    path = write(tmp_path / "a.tar", ["a.json", "a.mp4", "b.json", "b.mp4"], {"b.mp4": kind})
    samples, faults = read(path)
    assert samples[0] == ("a", ["json", "mp4"])
    for line in (samples[1], faults[0]):
        assert "link_member" in line
        assert words in line
        assert "--dereference" in line
    assert verify(path, capsys)["bad"] == {"link_member": 2}  # the sample, and the shard's count


def test_a_link_alone_is_counted(tmp_path, capsys):
    """A link before the other members of its sample, or without any."""
    links = {name: tarfile.SYMTYPE for name in ("a.0.mp4", "c.mp4")}
    path = write(tmp_path / "a.tar", ["a.0.mp4", "a.json", "b.json", "b.mp4", "c.mp4"], links)
    samples, faults = read(path)
    assert "2 links or devices, the first is a.0.mp4" in faults[0]
    assert "link_member: a.0.mp4, a symbolic link" in samples[0]
    assert samples[1] == ("b", ["json", "mp4"])
    assert verify(path, capsys)["bad"] == {"link_member": 2}  # the sample, and the shard's count


def test_a_link_before_the_file_of_its_sample(tmp_path, capsys):
    """In the order of tar, the link is a fault of its own sample, not of the one before."""
    names = ["k1.jpg", "k1.json", "k2.0.jpg", "k2.1.jpg", "k2.json", "k25.jpg", "k3.json", "k3.mp4"]
    links = {name: tarfile.SYMTYPE for name in (*names[2:4], "k25.jpg")}
    path = write(tmp_path / "a.tar", names, links)
    samples, faults = read(path)
    assert "3 links or devices, the first is k2.0.jpg" in faults[0]
    assert "link_member: k2.0.jpg" in samples[1]
    assert samples[2] == ("k3", ["json", "mp4"])
    assert len(samples) == 3
    assert "link" not in str(samples[0])
    with tarfile.open(path) as tar:
        starts = {member.name: member.offset for member in tar}
    report = verify(path, capsys)
    assert report["bad"]["link_member"] == 2
    assert [item["key"] for item in report["items"] if "k2.0.jpg," in item["detail"]] == ["", "#1"]
    walked = [starts[name] for name in ("k1.jpg", "k2.0.jpg", "k3.json")]
    with open(path, "rb") as file:
        assert sample_offsets(file)[0][:3] == walked


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_tar_of_links_alone_says_so(tmp_path, capsys, kind):
    path = write(tmp_path / "a.tar", ["a.jpg", "a.json"], {"a.jpg": kind, "a.json": kind})
    samples, (fault,) = read(path)
    assert not samples
    for words in ("link_member", "2 links", "a.jpg", "no file in it", "--dereference"):
        assert words in fault
    assert verify(path, capsys)["bad"] == {"link_member": 1}
    assert "tar_empty" in read(write(tmp_path / "b.tar", ["._a.json"]))[1][0]


def test_the_advice_for_links_helps(tmp_path):
    (tmp_path / "elsewhere").write_bytes(VIDEO)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(TEXT)
    (tmp_path / "in" / "a.mp4").symlink_to(tmp_path / "elsewhere")
    tar = ["tar", "-C", str(tmp_path / "in"), "--sort=name", "-cf", str(tmp_path / "a.tar")]
    subprocess.run([*tar, "--dereference", "--hard-dereference", "."], check=True)
    assert read(tmp_path / "a.tar") == ([("./a", ["json", "mp4"])], [])


def test_visuals_of_a_sample_stand_in_natural_order():
    picture = encode_image(draw_frames(0, 1)[0][0])
    turns = [{"from": "human", "value": "<image>" * 4}, {"from": "gpt", "value": "x"}]
    names = ["frame_10.jpg", "frame_2.jpg", "frame_1.jpg", "frame_11.jpg"]
    for prefix in ("", "1.", "b"):
        raw = {f"{prefix}{name.removeprefix('frame_' * (not prefix))}": picture for name in names}
        raw["json"] = json.dumps({"conversations": turns}).encode()
        numbers = [int("".join(filter(str.isdigit, name))) for name in parse_sample(raw)[1]]
        assert numbers == sorted(numbers)


def test_natural_order():
    names = ["frame_1.png", "Frame_2.PNG", "frame_10.png", "frame_010.png", "x.png", "frame.png"]
    assert sorted(names, key=natural_key) == [
        "frame.png", "frame_1.png", "Frame_2.PNG", "frame_010.png", "frame_10.png", "x.png",
    ]  # fmt: skip
    assert sorted(["10", "9", "²", "a"], key=natural_key) == ["9", "10", "a", "²"]
