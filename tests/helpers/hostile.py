"""Makes videos and pictures whose headers make false claims."""

import io
import struct
import zlib

import av
import numpy as np
from PIL import Image

from datamodules.shards.synthetic import draw_frames, encode_image, make_sample

CLIP = make_sample(4)["mp4"]  # a good one


def h264_sps(side: int) -> bytes:
    """Returns the header of an H.264 baseline stream of side x side pixels."""
    numbers = [0, 0, 2, 1, side // 16 - 1, side // 16 - 1]
    coded = ["0" * (len(f"{n + 1:b}") - 1) + f"{n + 1:b}" for n in numbers]
    bits = "".join(
        [f"{66:08b}{0:08b}{62:08b}", *coded[:4], "0", *coded[4:], "1", "1", "0", "0", "1"]
    )
    bits += "0" * (-len(bits) % 8)
    return b"\x67" + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\0\0", b"\0\0\3")


def with_sps(side: int) -> bytes:
    """Returns a clip whose header tells the decoder a wrong size."""
    data = bytearray(CLIP)
    at = data.find(b"avcC") + 10
    size = struct.unpack(">H", data[at : at + 2])[0]
    data[at + 2 : at + 2 + size] = h264_sps(side).ljust(size, b"\0")
    return bytes(data)


def with_frames(count: int) -> bytes:
    """Returns a clip whose tables claim `count` frames of one byte."""
    data = bytearray(CLIP)
    for box, offset, values in (
        (b"stsz", 8, (1, count)),
        (b"stsc", 16, (count,)),
        (b"stts", 12, (count,)),
    ):
        struct.pack_into(f">{len(values)}I", data, data.find(box) + offset, *values)
    return bytes(data)


def png_in_mov(side: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as out:
        stream = out.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        out.mux(stream.encode(picture))
        out.mux(stream.encode())
    data = bytearray(file.getvalue())
    at = data.find(b"IHDR")
    struct.pack_into(">II", data, at + 4, side, side)
    struct.pack_into(">I", data, at + 17, zlib.crc32(data[at : at + 17]))
    return bytes(data)


def skipped_frames(count: int, side: int) -> bytes:
    """Returns a video of large frames of a few bytes each. Each needs all frames before it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "100000", "threads": "1"}
        frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
        packets = []
        for number in range(3):
            frame.pts = number
            packets += stream.encode(frame)
        packets += stream.encode()
        unit = packets[-1].pts - packets[-2].pts
        for packet in packets[:-1]:
            out.mux(packet)
        last = bytes(packets[-1])
        for number in range(2, count):
            packet = av.Packet(last)
            packet.stream, packet.time_base = stream, packets[-1].time_base
            packet.pts = packet.dts = number * unit
            out.mux(packet)
    return file.getvalue()


def audio_alone() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    return file.getvalue()


def gif_bomb() -> bytes:
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(
        file, "GIF", save_all=True, append_images=[Image.new("P", (9, 9))]
    )
    data = bytearray(file.getvalue())
    struct.pack_into("<HH", data, 6, 65535, 65535)
    return bytes(data)


def jpeg_bomb(side: int) -> bytes:
    data = bytearray(encode_image(draw_frames(0, 1)[0][0]))
    struct.pack_into(">HH", data, data.find(b"\xff\xc0") + 5, side, side)
    return bytes(data)


def jpeg_of_scans(scans: int) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated `scans` times more."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:-2] + (data[last:-2]) * scans + data[-2:]


def png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9)))


def webp_bomb() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    at = data.find(b"VP8X") + 12
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(data)
