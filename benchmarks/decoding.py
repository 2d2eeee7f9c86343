"""Benchmarks reading frames of videos: unwanted frames are not decoded.

The clips use x264's defaults, so no other frame refers to two thirds of their frames. The baseline
jumps to keyframes in the same way, but decodes every frame up to the next wanted one.
"""

import io
from unittest.mock import patch

import av
import numpy as np
import torch
from harness import Row, compare, table

from datamodules.shards.synthetic import draw_frames
from datamodules.visuals import videos
from datamodules.visuals.frames import FrameReader, UniformSampler

CLIPS, SECONDS, RATE, WIDTH, HEIGHT = 3, 8, 30, 640, 360


def run() -> list[Row]:
    clips = [encode(seed) for seed in range(CLIPS)]
    return [row(clips, count) for count in (8, 32)]


def encode(seed: int) -> bytes:
    """Returns a video of a moving square over drifting noise, with x264's default settings."""
    shift = torch.Generator().manual_seed(seed)
    ground = torch.randint(0, 60, (HEIGHT, WIDTH, 3), generator=shift, dtype=torch.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"threads": "1"}
        for n, picture in enumerate(draw_frames(seed, SECONDS * RATE, HEIGHT)[0]):
            pixels = torch.from_numpy(np.array(picture.resize((WIDTH, HEIGHT))))
            pixels = pixels // 2 + ground.roll(n, 1)
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def row(clips: list[bytes], count: int) -> Row:
    reader = FrameReader(336, UniformSampler(count))

    def ours() -> list[torch.Tensor]:
        return [reader.video(clip) for clip in clips]

    def everything() -> list[torch.Tensor]:
        with patch.object(videos, "_MARKS_UNREFERENCED", frozenset()):
            return ours()

    name = f"{count} frames of {SECONDS} s, with unneeded B-frames"
    return compare(name, ours, everything, at_least=1.1, tolerance=0.0)


if __name__ == "__main__":
    print(table(run()))
