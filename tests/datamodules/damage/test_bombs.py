"""Bombs: small files that claim gigabytes or hours of work are refused at little cost."""

import subprocess
import sys
import tarfile
import zlib
from functools import partial

import pytest

from datamodules.errors import BadSampleError
from datamodules.stream.reading.tar import untar_sample
from datamodules.visuals.images import open_image
from tests.helpers.hostile import (
    gif_bomb,
    jpeg_bomb,
    jpeg_of_scans,
    png_bomb,
    png_in_mov,
    skipped_frames,
    webp_bomb,
    with_frames,
    with_sps,
)
from tests.helpers.tiny_shards import tar_bytes

BOMBS = {
    "mp4 of 60,000 x 60,000": ("video", partial(with_sps, 60_000)),
    "mp4 of 16,000 x 16,000": ("video", partial(with_sps, 16_000)),
    "mov of 16,000 x 16,000": ("video", partial(png_in_mov, 16_000)),
    "mp4 of 80 million frames": ("video", partial(with_frames, 80_000_000)),
    "mp4 of an hour of large frames": ("video", partial(skipped_frames, 100_000, 2048)),
    "gif": ("video", gif_bomb),
    "png": ("image", partial(png_bomb, 60_000)),
    "png of 16,000 x 16,000": ("image", partial(png_bomb, 16_000)),
    "jpg": ("image", partial(jpeg_bomb, 60_000)),
    "jpg of 16,000 x 16,000": ("image", partial(jpeg_bomb, 16_000)),
    "jpg of scans": ("image", partial(jpeg_of_scans, 20_000)),
    "webp": ("image", webp_bomb),
}

READ = """
import resource, sys, time
from datamodules.errors import BadSampleError
from datamodules.visuals.frames import FrameReader, UniformSampler
reader = FrameReader(32, UniformSampler(4))
for kind, path in zip(sys.argv[1::2], sys.argv[2::2]):
    data = open(path, "rb").read()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        getattr(reader, kind)(data)
        reason = "none"
    except BadSampleError as error:
        reason = error.reason
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(reason, grown // 1024, round(time.process_time() - began, 1), len(data))
"""


def test_bombs_stay_within_memory_and_time(tmp_path):
    """Kilobytes that claim gigabytes or hours of work cost a few megabytes and seconds."""
    arguments = []
    for number, (kind, make) in enumerate(BOMBS.values()):
        (tmp_path / f"{number}").write_bytes(make())
        arguments += [kind, str(tmp_path / f"{number}")]
    lines = subprocess.run(
        [sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for name, line in zip(BOMBS, lines, strict=True):
        reason, mib, seconds, _ = line.split()
        assert reason != "none", name
        assert int(mib) < 256, f"{name}: {line}"
        assert float(seconds) < 10, f"{name}: {line}"


def test_an_image_bomb_has_its_reason():
    for data in (png_bomb(60_000), jpeg_bomb(60_000), jpeg_of_scans(20_000)):
        with pytest.raises(BadSampleError) as caught:
            open_image(data)
        assert caught.value.reason == "image_too_large"


def test_a_member_that_looks_compressed_is_not_decompressed(tmp_path):
    """The header is valid for tar and for gzip. The sample is the one that tar reads."""
    name = b"\x1f\x8b\x08\x04aaaaaa\xf0\x01"  # a gzip header with an extra field over tar's own
    bomb = zlib.compressobj(9, wbits=-15)
    data = bomb.compress(tar_bytes([("b.json", bytes(50 << 20))])) + bomb.flush()
    header = bytearray(tarfile.TarInfo("x.bin").tobuf(tarfile.GNU_FORMAT))
    header[:100] = (name + b".bin").ljust(100, b"\0")
    header[124:136] = b"%011o\0" % len(data)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    padded = data.ljust(-(-len(data) // 512) * 512, b"\0")
    assert untar_sample(bytes(header) + padded, "u")["bin"] == data
