"""Files that annotations name: folders of frames, links, accents, and messages with file names."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.media import Media
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.frames import FpsSampler, FrameReader
from tests.datamodules.shards.test_annotations import pack, turns

VIDEO = encode_video(draw_frames(0, 4)[0])


def about(video: str, **fields) -> dict:
    return {
        "id": "x",
        "video": video,
        "conversations": turns("<video>\nWhat?", "A card."),
        **fields,
    }


def first_video(folder: Path) -> bytes:
    reader = ShardReader(read_manifest(str(folder / "out")), 30.0)
    raw = untar_sample(reader.read(0, 0), "")
    reader.close()
    return raw["mp4"]


@pytest.mark.parametrize(
    "form", ["{}.jpg", "frame_{}.png", "{}.JPG", "Frame {}.Jpeg", "v1.2_{:d}.WEBP", "{:03d}.png"]
)
def test_frames_of_a_folder_in_the_order_of_their_numbers(tmp_path, form):
    """Frame n is grey with brightness 20 n. Files of macOS and Windows lie beside the frames."""
    folder = tmp_path / "media" / "clips" / "v_1.2_a"
    folder.mkdir(parents=True)
    for n in range(1, 13):
        path = folder / form.format(n)
        Image.new("RGB", (32, 32), (20 * n,) * 3).save(path, quality=95)
        (folder / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "Thumbs.db").write_bytes(b"\0")
    (folder / "notes.txt").write_text("no frame")
    for n, name in enumerate(("clips/v_1.2_a", "clips/v_1.2_a.mp4", "clips/v_1.2_a/")):
        out = tmp_path / str(n)
        out.mkdir()
        assert pack(out, tmp_path / "media", [about(name)]) == 0
        frames = FrameReader(32, FpsSampler(100.0, 100)).video(first_video(out))
        assert len(frames) == 12
        means = frames.float().mean(dim=(1, 2, 3))
        assert [round(float(mean) / 20) for mean in means] == list(range(1, 13))


@pytest.mark.parametrize(
    "names",
    [
        ["0.25", "0.5", "0.75", "1", "1.125", "1.5", "10.0"],  # seconds
        ["1.1", "1.2", "1.9", "1.10", "1.11", "2.1"],  # chapter and page numbers
        ["v1.5", "v1.25", "v2"],  # versions
        ["0.5", "0.25s", "1"],  # not all names are numbers
    ],
)
def test_names_that_are_numbers_stand_by_their_values(tmp_path, names):
    folder = tmp_path / "v"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.jpg").write_bytes(b"")
    assert Media(tmp_path).frames("v") == [f"v/{name}.jpg" for name in names]


def test_a_folder_without_pictures_says_what_is_there(tmp_path, capsys):
    (tmp_path / "media" / "v").mkdir(parents=True)
    for name in ("1.bmp", "._1.jpg"):
        (tmp_path / "media" / "v" / name).write_bytes(b"BM")
    assert pack(tmp_path, tmp_path / "media", [about("v")]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "video_empty: v.mp4: no picture in the folder v: 1.bmp" in shown


def test_a_bad_visual_is_named(tmp_path, capsys):
    """The message has the line of the entry, its id and the file, and for a folder the frame."""
    media = tmp_path / "media"
    (media / "v").mkdir(parents=True)
    (media / "good.mp4").write_bytes(VIDEO)
    (media / "broken.mp4").write_bytes(b"no video" * 50)
    (media / "page.jpg").write_bytes(b"<html>not found</html>")
    (media / "v" / "1.jpg").write_bytes(encode_image(draw_frames(0, 1)[0][0]))
    (media / "v" / "2.jpg").write_bytes(b"nothing")
    entries = [
        about("good.mp4"),
        about("broken.mp4"),
        {**about("x"), "video": ["good.mp4", "broken.mp4"],
         "conversations": turns("<video><video>", "x")},
        {"id": 7, "image": "page.jpg", "conversations": turns("<image>", "x")},
        about("v"),
        about("absent.mp4"),
    ]  # fmt: skip
    for options in ((), ("--reencode", "32")):
        assert pack(tmp_path, media, entries, *options, "--overwrite", lines=True) == 1
        shown = capsys.readouterr().out
        for line, words in (
            ("line 2 (x)]", "broken.mp4: "),
            ("line 3 (x)]", "broken.mp4: "),
            ("line 4 (7)]", "image_unreadable: page.jpg: "),
            ("line 5 (x)]", "image_unreadable: v/2.jpg: "),
            ("line 6 (x)]", "file_missing: absent.mp4"),
        ):
            (found,) = [one for one in shown.splitlines() if line in one]
            assert words in found


@pytest.fixture
def linked(tmp_path) -> Path:
    """Returns `media` with links to a file, a folder, itself, nothing, and in a circle."""
    outside, media = tmp_path / "store", tmp_path / "media"
    outside.mkdir()
    media.mkdir()
    (outside / "a.mp4").write_bytes(VIDEO)
    (media / "own.mp4").write_bytes(VIDEO)
    (media / "file.mp4").symlink_to(outside / "a.mp4")
    (media / "folder").symlink_to(outside)
    (media / "inside.mp4").symlink_to("own.mp4")
    (media / "nothing.mp4").symlink_to(outside / "gone.mp4")
    (media / "circle.mp4").symlink_to("circle.mp4")
    return media


def test_links_are_followed_only_where_it_is_asked_for(linked, tmp_path, capsys):
    names = ["file.mp4", "folder/a.mp4", "inside.mp4"]
    entries = [about(name) for name in names]
    assert pack(tmp_path, linked, entries) == 1
    shown = capsys.readouterr().out
    for name in names[:2]:
        (line,) = [one for one in shown.splitlines() if f"unsafe_path: {name}" in one]
        assert f"symbolic link to {tmp_path}/store/a.mp4" in line
        assert "--follow-links" in line
    assert "inside.mp4" not in shown
    assert pack(tmp_path, linked, entries, "--overwrite", "--follow-links") == 0
    assert len(read_manifest(str(tmp_path / "out"))) == 3


@pytest.mark.parametrize("follow", [False, True])
def test_no_name_leads_out_of_the_folder(linked, tmp_path, follow):
    media = Media(linked, follow)
    for name in ("../store/a.mp4", str(tmp_path / "store" / "a.mp4"), "folder/../../store/a.mp4"):
        with pytest.raises(BadSampleError, match=r"unsafe_path.*is outside"):
            media.read(name)
    for name in ("own.mp4", str(linked / "own.mp4"), "folder/../own.mp4", "./own.mp4"):
        assert media.read(name) == VIDEO
    for name, words in (
        (
            "nothing.mp4",
            r"file_missing: nothing.mp4 is a symbolic link to .*gone.mp4, which does not exist",
        ),
        ("circle.mp4", "file_unreadable: circle.mp4"),
        ("a\0.mp4", "file_unreadable"),
        ("", "file_unreadable"),
    ):
        with pytest.raises(BadSampleError, match=words):
            media.read(name)
    os.mkfifo(linked / "pipe.mp4")
    with pytest.raises(BadSampleError, match=r"file_unreadable: pipe.mp4: not a file"):
        media.read("pipe.mp4")


def test_the_folder_itself_may_be_a_link(linked, tmp_path):
    (tmp_path / "by").symlink_to(linked)
    assert Media(tmp_path / "by").read("own.mp4") == VIDEO
    assert Media(tmp_path / "by").read(str(linked / "own.mp4")) == VIDEO


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_are_found_however_they_are_written(tmp_path, stored):
    """macOS stores é as e and an accent. Linux can hold both names."""
    name = "vidéos/été ñ 100%25.mp4"
    path = tmp_path / unicodedata.normalize(stored, name)
    path.parent.mkdir()
    path.write_bytes(VIDEO)
    for asked in ("NFC", "NFD"):
        assert Media(tmp_path).read(unicodedata.normalize(asked, name)) == VIDEO


def test_a_missing_file_tells_what_is_nearly_it(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("My video.MP4", "d/b.mp4"):
        (tmp_path / name).write_bytes(VIDEO)
    for name, near in (
        ("my video.mp4", "My video.MP4"),
        ("My%20video.MP4", "My video.MP4"),
        ("d/B.mp4", "b.mp4"),
    ):
        with pytest.raises(BadSampleError, match=f"file_missing: {name}: did you mean '{near}'"):
            Media(tmp_path).read(name)
    with pytest.raises(BadSampleError, match=r"file_missing: e/x.mp4$"):
        Media(tmp_path).read("e/x.mp4")


def test_endings_in_capitals_and_dots_in_names(tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for name in ("A.MP4", "v_1.2_a.mp4"):
        (media / name).write_bytes(VIDEO)
    assert pack(tmp_path, media, [about("A.MP4"), about("v_1.2_a"), about("v_1.2_a.mp4")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())[1]["video"] == "v_1.2_a"
    assert pack(tmp_path, media, [about("a.exe")], "--overwrite") == 1
