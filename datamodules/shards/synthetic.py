"""Small real shards: H.264 clips, JPEGs and conversations about them, deterministic per seed."""

import errno
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw

from datamodules.shards.pack import write_shard
from datamodules.stream.index import index_path

_MADE = "made.json"  # beside the shards of prepare_shards
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
}
_KINDS = ("video", "images", "video", "text")


def draw_frames(seed: int, num_frames: int, size: int = 64) -> tuple[list[Image.Image], str, int]:
    """Draws a square with a digit that moves over a gradient. Returns (frames, color, digit)."""
    rng = np.random.RandomState(seed)
    color, digit = list(COLORS)[rng.randint(len(COLORS))], int(rng.randint(10))
    start, step = rng.uniform(0, size, 2), rng.uniform(-size / 8, size / 8, 2)
    ramp = np.linspace(0, 120, size, dtype=np.uint8)
    ground = np.stack([np.add.outer(ramp, np.roll(ramp, rng.randint(size)))] * 3, axis=-1)
    frames = []
    for n in range(num_frames):
        frame = Image.fromarray(ground)
        x, y = (start + n * step) % (size * 2 / 3)
        pen = ImageDraw.Draw(frame)
        pen.rectangle([x, y, x + size / 3, y + size / 3], fill=COLORS[color])
        pen.text((x + size / 8, y + size / 16), str(digit), fill=(255, 255, 255))
        frames.append(frame)
    return frames, color, digit


def encode_video(frames: Sequence[Image.Image], fps: int = 8, gop: int = 8) -> bytes:
    """Encodes frames as H.264 in MP4, with reproducible bytes.

    For this it uses one thread, and frames must have at least 64 pixels per side: with smaller
    frames, x264's assembly differs by a bit in about one of fifty clips.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.options = {"g": str(gop), "bf": "0", "threads": "1", "preset": "veryfast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()


def encode_image(frame: Image.Image) -> bytes:
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=90)
    return file.getvalue()


def make_sample(
    seed: int, num_frames: int = 12, size: int = 64, kinds: Sequence[str] = _KINDS
) -> dict[str, Any]:
    """Returns the members of one sample by suffix. Seeds cycle through `kinds`."""
    frames, color, digit = draw_frames(seed, num_frames, size)
    kind = kinds[seed % len(kinds)]
    if kind == "video":
        members = {"mp4": encode_video(frames)}
        turns = ["<video>\nWhat color is the square?", color, "Which digit is on it?", str(digit)]
    elif kind == "image":
        members = {"jpg": encode_image(frames[0])}
        turns = ["<image>\nWhat color is the square?", color]
    elif kind == "images":
        members = {"0.jpg": encode_image(frames[0]), "1.jpg": encode_image(frames[-1])}
        turns = ["<image>\n<image>\nWhich digit is in both images?", str(digit)]
    else:  # text
        members = {}
        turns = [f"Which number comes after {digit}?", str(digit + 1)]
    roles = ["human", "gpt"] * (len(turns) // 2)
    conversations = [{"from": r, "value": t} for r, t in zip(roles, turns, strict=True)]
    entry = {"id": f"synthetic-{seed}", "conversations": conversations}
    return {**members, "json": json.dumps(entry).encode()}


def make_pair(seed: int, num_frames: int = 12, size: int = 64) -> dict[str, Any]:
    """Returns the members of one sample by suffix: a video and a pair about its square's color.

    The right color is chosen, and another color is rejected.
    """
    frames, color, _ = draw_frames(seed, num_frames, size)
    others = [name for name in COLORS if name != color]
    question = {"from": "human", "value": "<video>\nWhat color is the square?"}
    entry = {"conversations": [question], "chosen": color, "rejected": others[seed % len(others)]}
    return {"mp4": encode_video(frames), "json": json.dumps(entry).encode()}


def write_shards(
    folder: str | Path,
    counts: Sequence[int],
    *,
    seed: int = 0,
    num_frames: int = 12,
    size: int = 64,
    make: Callable[[int, int, int], dict[str, Any]] = make_sample,
) -> list[Path]:
    """Writes one shard per count, with its index, and returns the paths of the shards.

    `make` returns the members of a sample by suffix from its seed, `num_frames` and `size`.
    """
    paths = []
    for number, count in enumerate(counts):
        path = Path(folder) / f"shard-{number:06d}.tar"
        first = seed + sum(counts[:number])
        samples = [(f"{n:09d}", make(n, num_frames, size)) for n in range(first, first + count)]
        write_shard(path, samples)
        if count and not index_path(path).is_file():
            raise OSError(errno.EIO, "cannot be written", str(index_path(path)))
        paths.append(path)
    return paths


@rank_zero_only
def prepare_shards(folder: str | Path, counts: Mapping[str, Sequence[int]], **options: Any) -> None:
    """Makes a folder of shards for each split by an atomic rename. An existing folder stays.

    Passes `options` to `write_shards`, and stores them beside the shards in `made.json`.

    Raises:
        ValueError: the existing shards were made with other options.
    """
    folder = Path(folder)
    asked = _plain({"counts": {name: list(each) for name, each in counts.items()}, **options})
    if folder.is_dir():
        _compare(folder, asked)
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    for number, (split, of_shards) in enumerate(counts.items()):
        seed = 1_000_000 * number  # no sample is in two splits
        write_shards(partial / split, of_shards, seed=seed, **options)
    (partial / _MADE).write_text(json.dumps(asked, indent=1))
    partial.rename(folder)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Returns options as plain JSON values. A function becomes its name."""
    return json.loads(
        json.dumps(options, default=lambda each: getattr(each, "__name__", str(each)))
    )


def _compare(folder: Path, asked: dict[str, Any]) -> None:
    path = folder / _MADE
    made = json.loads(path.read_text()) if path.is_file() else asked
    for key in [*asked, *made]:
        if made.get(key) != asked.get(key):
            raise ValueError(
                f"{folder} was made with {key}={json.dumps(made.get(key))}, this run has "
                f"{json.dumps(asked.get(key))}: remove that folder, or choose another directory "
                "with hydra.run.dir=…"
            )
