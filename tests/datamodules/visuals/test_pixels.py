"""Colours and orientation of frames: as FFmpeg and Pillow show them, and as computed by hand."""

import io
import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from datamodules.errors import BadSampleError
from datamodules.shards.reencode import encode_frames, reencode
from datamodules.visuals.frames import FrameReader, UniformSampler
from datamodules.visuals.images import open_image
from datamodules.visuals.tiles import cut_tiles
from tests.helpers.films import film, noise, plain, turned

READER = FrameReader(16, UniformSampler(2))
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (230, 230, 230)
NAMES = dict(zip("RGBW", (RED, GREEN, BLUE, WHITE), strict=True))

# The quarters of a picture (upper left, upper right, lower left, lower right) as they are shown, by
# Exif orientation. The matrices are a, b, c, d of MP4's track header; the quarters were read from
#   ffmpeg -i turned.mp4 -frames:v 1 -vf scale=64:64 -pix_fmt rgb24 -f rawvideo -
# (FFmpeg 5.1 with its autorotate), and agree with the table of the Exif standard.
TURNS = {
    1: ((1, 0, 0, 1), "RGBW"),
    2: ((-1, 0, 0, 1), "GRWB"),
    3: ((-1, 0, 0, -1), "WBGR"),
    4: ((1, 0, 0, -1), "BWRG"),
    5: ((0, 1, 1, 0), "RBGW"),
    6: ((0, 1, -1, 0), "BRWG"),
    7: ((0, -1, -1, 0), "WGBR"),
    8: ((0, -1, 1, 0), "GWRB"),
}


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, : width // 2] = BLUE
    picture[height // 2 :, width // 2 :] = WHITE
    return picture


def seen(frame) -> str:
    """Returns the names of the four quarters of a frame (c h w)."""
    height, width = frame.shape[1:]
    colors = [
        np.asarray(frame)[:, y, x].astype(int)
        for y in (height // 4, 3 * height // 4)
        for x in (width // 4, 3 * width // 4)
    ]
    return "".join(
        min(NAMES, key=lambda name: np.abs(color - NAMES[name]).sum()) for color in colors
    )


def size_of(data: bytes) -> tuple[int, int]:
    with av.open(io.BytesIO(data), "r") as container:
        return container.streams.video[0].width, container.streams.video[0].height


@pytest.mark.parametrize("orientation", TURNS)
def test_every_display_matrix_is_shown_as_players_do(orientation):
    matrix, expected = TURNS[orientation]
    data = turned(film([quarters()] * 3), *matrix)
    assert seen(READER.video(data)[0]) == expected
    again = reencode(data, 48)
    assert seen(READER.video(again)[0]) == expected
    assert size_of(again) == ((64, 48) if orientation < 5 else (48, 64))


def test_an_angle_between_two_quarters_is_the_nearer_one():
    data = turned(film([quarters()] * 3), 1, 0, 0, 1)
    at = data.index(b"tkhd") + 44
    cos, sin = round(0.2 * 65536), round(0.98 * 65536)  # 78 degrees
    changed = bytearray(data)
    struct.pack_into(">5i", changed, at, cos, sin, 0, -sin, cos)
    assert seen(READER.video(bytes(changed))[0]) == TURNS[6][1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_every_exif_orientation_is_shown_as_viewers_do(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(quarters()).save(file, kind, exif=exif)
    expected = TURNS[orientation][1]
    assert seen(READER.image(file.getvalue())[0]) == expected
    picture = open_image(file.getvalue())
    assert picture.size == ((64, 48) if orientation < 5 else (48, 64))
    tiles = cut_tiles(picture, 16, [(2, 2)])[0]
    assert seen(tiles[0]) == expected


# --- colours --------------------------------------------------------------------------------------

COLORS = [(60, 160, 60), (200, 30, 60), (40, 60, 220), (250, 250, 250), (5, 5, 5)]
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
# Kr and Kb; full range; bits; matrix and range in the file, as FFmpeg numbers them
KINDS = {
    "nothing said": (BT601, False, 8, {}),
    "BT.601": (BT601, False, 8, {"colorspace": 6, "color_range": 1}),
    "BT.709": (BT709, False, 8, {"colorspace": 1, "color_range": 1}),
    "BT.601, full range": (BT601, True, 8, {"colorspace": 6, "color_range": 2}),
    "BT.709, full range": (BT709, True, 8, {"colorspace": 1, "color_range": 2}),
    "BT.2020, 10 bits": (BT2020, False, 10, {"colorspace": 9, "color_range": 1}),
}


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("kind", KINDS)
def test_colors_are_those_that_were_calculated(kind, color):
    matrix, full, bits, tags = KINDS[kind]
    data = plain(matrix, color, full, bits, tags)
    read = READER.video(data)[0].numpy().astype(int)
    assert np.abs(read - np.reshape(color, (3, 1, 1))).max() <= 2
    again = READER.video(reencode(data, 48))[0].numpy().astype(int)
    assert np.abs(again - np.reshape(color, (3, 1, 1))).max() <= 3
    assert np.abs(again - read).max() <= 2


def test_what_is_encoded_says_how_it_is_to_be_read():
    """Other readers must guess otherwise: from the size, or always BT.601."""
    for data in (
        reencode(plain(BT601, (60, 160, 60), True, 8, {"colorspace": 6, "color_range": 2}), 48),
        encode_frames([png(np.full((48, 64, 3), (60, 160, 60), np.uint8))] * 2, None),
    ):
        with av.open(io.BytesIO(data), "r") as container:
            codec = container.streams.video[0].codec_context
            assert (codec.colorspace, codec.color_range, codec.pix_fmt) == (1, 1, "yuv420p")
            frame = next(container.decode(video=0))
        y, cb, cr = (frame.to_ndarray()[place] for place in ((24, 32), (53, 32), (65, 32)))
        assert np.abs(np.subtract([y, cb, cr], [129, 94, 88], dtype=int)).max() <= 2
        read = READER.video(data)[0].numpy().astype(int)
        assert np.abs(read - np.reshape((60, 160, 60), (3, 1, 1))).max() <= 3


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_frames_are_those_of_ffmpegs_own_filters():
    """FFmpeg's filters scale and convert. They share no code with the reader."""
    data = film(noise(12, 128, 96), crf=10)
    graph = av.filter.Graph()
    expected = []
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        scale = graph.add("scale", "24:24:flags=area+full_chroma_int")
        form = graph.add("format", "rgb24")
        sink = graph.add("buffersink")
        for one, other in ((source, scale), (scale, form), (form, sink)):
            one.link_to(other)
        graph.configure()
        for frame in container.decode(stream):
            graph.push(frame)
            expected.append(graph.pull().to_ndarray())
    read = FrameReader(24, UniformSampler(12)).video(data).permute(0, 2, 3, 1).numpy()
    differences = np.abs(read.astype(int) - np.stack(expected))
    assert differences.mean() < 3  # they place the chroma at edges differently
    assert differences[:, 1::4, 1::3].max() <= 3  # in the middle of a patch


def test_images_are_those_of_pillow():
    picture = noise(1, 96, 64)[0]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    read = FrameReader(32, UniformSampler(1)).image(file.getvalue())[0].permute(1, 2, 0).numpy()
    block = picture[8, 8].astype(int), picture[8, 88].astype(int), picture[56, 8].astype(int)
    found = read[4, 3], read[4, 29], read[28, 3]
    assert max(np.abs(a - b).max() for a, b in zip(found, block, strict=True)) <= 6


# --- pictures of other kinds ----------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_of(values: np.ndarray, color_type: int, *extra: bytes) -> bytes:
    """Returns a PNG of 16 bits per channel (rows, columns, channels), made without a library."""
    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


RAMP = np.linspace(0, 65535, 52).round().astype(int)[None].repeat(4, 0)  # 1285 a step


def test_sixteen_bits_are_scaled():
    expected = np.arange(0, 256, 5)  # 1285 / 257
    grey = np.asarray(open_image(png_of(RAMP, 0)))
    assert (grey == expected[None, :, None]).all()
    between = np.arange(0, 65535, 257)[None] + 150  # nearer to the next value of 8 bits
    assert (np.asarray(open_image(png_of(between, 0)))[0, :, 0] == np.arange(1, 256)).all()
    color = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 32896)], axis=-1)
    read = np.asarray(open_image(png_of(color, 2))).astype(int)
    wanted = np.stack([expected, expected[::-1], np.full(52, 128)], axis=-1)
    assert np.abs(read - wanted).max() <= 1
    alpha = np.stack([RAMP, np.full_like(RAMP, 65535)], axis=-1)
    assert (
        np.abs(np.asarray(open_image(png_of(alpha, 4))).astype(int)[0, :, 0] - expected).max() <= 1
    )


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def palette(*colors: int) -> Image.Image:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette(list(colors))
    return picture


SHOWN = {
    "transparent": (saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), (255, 255, 255)),
    "half transparent": (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
    "opaque": (saved(Image.new("RGBA", (8, 8), (200, 30, 60, 255))), (200, 30, 60)),
    "transparent WebP": (
        saved(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True),
        (255, 255, 255),
    ),
    "grey with alpha": (saved(Image.new("LA", (8, 8), (0, 51))), (204, 204, 204)),
    "palette": (saved(palette(0, 0, 0, 200, 30, 60)), (200, 30, 60)),
    "hidden in a palette": (saved(palette(0, 0, 0, 9, 9, 9), transparency=1), (255, 255, 255)),
    "faint in a palette": (
        saved(palette(0, 0, 0, 255, 0, 0), transparency=b"\xff\x33"),
        (255, 204, 204),
    ),
    "hidden grey": (saved(Image.new("L", (8, 8), 9), transparency=9), (255, 255, 255)),
    "hidden grey of 16 bits": (
        png_of(np.full((8, 8), 300), 0, chunk(b"tRNS", b"\1\x2c")),
        (255, 255, 255),
    ),
    "grey of 16 bits that another hides": (
        png_of(np.full((8, 8), 25700), 0, chunk(b"tRNS", b"\1\x2c")),
        (100, 100, 100),
    ),
    "one bit": (saved(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "grey JPEG": (saved(Image.new("L", (8, 8), 90), "JPEG"), (90, 90, 90)),
    "CMYK JPEG": (saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
}


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_of_every_kind_are_shown(name):
    data, color = SHOWN[name]
    picture = open_image(data)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture).astype(int) - color).max() <= 1
    assert READER.image(data).shape == (1, 3, 16, 16)


OTHERS = {
    "it is a GIF": saved(Image.new("P", (8, 8)), "GIF"),
    "it is an HTML page": b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404</body></html>",
    "it is an MP4 video": film(noise(2)),
    "it is a BMP image": saved(Image.new("RGB", (8, 8)), "BMP"),
    "it is a HEIC image": b"\0\0\0\x18ftypheix\0\0\0\0mif1heix",  # of 10 bits, as cameras write it
    "it is an AVIF image": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
    "it is an AVIF or HEIC image": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic",
    "it is a JSON file": b'{"error": "not found"}',
    "it is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "0 bytes": b"",
}


@pytest.mark.parametrize("words", OTHERS)
def test_what_a_wrong_file_is_stands_in_the_message(words):
    with pytest.raises(BadSampleError) as caught:
        READER.read("0.jpg", OTHERS[words])
    assert str(caught.value).startswith("image_unreadable: 0.jpg: " + words)


def test_a_page_under_the_name_of_a_video():
    with pytest.raises(BadSampleError, match="video_unreadable: mp4: it begins as an HTML page"):
        READER.read("mp4", OTHERS["it is an HTML page"])
    with pytest.raises(BadSampleError, match=r"not_a_video: 1\.mp4: it is a PNG image"):
        READER.read("1.mp4", png(quarters()))
