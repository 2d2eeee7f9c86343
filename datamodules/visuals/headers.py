"""Reads the sizes and sample counts that a video file's headers claim, without FFmpeg.

FFmpeg trusts these numbers. It reserves memory for every sample that an MP4 table claims, and it
reads a cut file as if it ended there.
"""

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from datamodules.errors import BadSampleError

_MP4_STARTS = (b"ftyp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot")
_MP4_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"cmov")
_MOST_BOXES = 1_000_000  # a day of one-second fragments has fewer
_MOST_HEADER = 64 << 20  # maximum bytes of a decompressed header


class _Box(NamedTuple):
    kind: bytes
    start: int  # start of its content
    end: int  # end as claimed by its header, maybe beyond the data


def missing_bytes(data: bytes) -> int:
    """Returns the number of bytes that a file's headers claim beyond its end, or 0.

    MP4, MOV, Matroska, WebM and AVI headers give the size of the content; other formats do not.
    """
    if data[4:8] in _MP4_STARTS:
        end = max((box.end for box in islice(_boxes(data, 0, len(data)), _MOST_BOXES)), default=0)
    elif data[:4] == b"\x1a\x45\xdf\xa3":
        end = _end_of_segment(data)
    elif data[:4] == b"RIFF":
        end = 0
        while data[end : end + 4] == b"RIFF":  # a large AVI has several RIFF parts
            end += 8 + int.from_bytes(data[end + 4 : end + 8], "little")
    else:
        return 0
    return max(0, end - len(data))


def check_claims(data: bytes) -> None:
    """Refuses an MP4 whose tables claim more samples than the file has bytes.

    Raises:
        BadSampleError: video_too_large.
    """
    claimed = _claimed(data)  # 0 if the bytes are not MP4 boxes
    if claimed > len(data):
        raise BadSampleError(
            "video_too_large", f"its header claims {claimed} samples in {len(data)} bytes"
        )


def _claimed(data: bytes) -> int:
    """Returns the samples that FFmpeg reserves memory for, over all tracks and fragments."""
    total = in_track = visited = 0
    kinds, uncompressed = set[bytes](), False
    todo = [(0, len(data))]  # byte ranges whose boxes are to be read, in file order
    while todo:
        start, end = todo.pop()
        box = next(_boxes(data, start, end), None)
        if box is None:
            continue
        visited += 1
        if visited > _MOST_BOXES:
            raise BadSampleError("video_too_large", f"more than {_MOST_BOXES} boxes")
        todo.append((box.end, end))
        if box.kind == b"trak":
            total, in_track, kinds, uncompressed = total + in_track, 0, set(), False
        if box.kind == b"cmvd":
            total += _claimed(_inflated(data[box.start : box.end]))
        elif box.kind in _MP4_CONTAINERS:
            todo.append((box.start, min(box.end, end)))
        elif box.kind == b"hdlr":
            kinds.add(data[box.start + 8 : box.start + 12])
        elif box.kind == b"stts":  # one entry, and every sample lasts one unit
            uncompressed = data[box.start + 4 : box.start + 8] == b"\0\0\0\1"
            uncompressed &= data[box.start + 12 : box.start + 16] == b"\0\0\0\1"
        elif box.kind == b"stsz":
            in_track += _number(data, box.start + 8)
        elif box.kind == b"trun":
            total += _number(data, box.start + 4)
        if uncompressed and b"soun" in kinds and b"vide" not in kinds:
            in_track = 0  # FFmpeg reads uncompressed audio in chunks, so samples cost no memory
    return total + in_track


def _boxes(data: bytes, start: int, end: int) -> Iterator[_Box]:
    while start + 8 <= end:
        size, kind, head = _number(data, start), data[start + 4 : start + 8], 8
        if size == 1 and start + 16 <= end:
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif size == 0:  # the box extends to the end
            size = end - start
        if size < head:
            return
        yield _Box(kind, start + head, start + size)
        start += size


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _inflated(content: bytes) -> bytes:
    """Decompresses the header in QuickTime's `cmvd` box: its size, then a zlib stream."""
    size = _number(content, 0)
    if size > _MOST_HEADER:
        raise BadSampleError("video_too_large", f"a compressed header of {size} bytes")
    try:
        return zlib.decompressobj().decompress(content[4:], size or 1)
    except zlib.error as error:
        raise BadSampleError("video_unreadable", str(error)) from None


def _end_of_segment(data: bytes) -> int:
    """Returns the end that Matroska's only segment claims, or 0 if it claims none."""
    start = 4
    size, length = _variable(data, start)
    start += length + size
    if data[start : start + 4] != b"\x18\x53\x80\x67":
        return 0
    size, length = _variable(data, start + 4)
    unknown = (1 << 7 * length) - 1  # all bits set: a live stream
    return 0 if size == unknown else start + 4 + length + size


def _variable(data: bytes, at: int) -> tuple[int, int]:
    """Returns an EBML number and its length in bytes, which its leading zero bits give."""
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return value & ((1 << 7 * length) - 1), length
