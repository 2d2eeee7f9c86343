"""Pictures of shapes whose captions describe the shape only after CLIP's 77 text tokens."""

import json
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.shards.synthetic import encode_image, encode_video

_COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
    "orange": (240, 140, 20),
    "purple": (140, 40, 160),
    "brown": (110, 70, 30),
    "grey": (128, 128, 128),
}
_SHAPES = ("square", "circle", "triangle")

#: (shape, its color, background color). len(KINDS) consecutive seeds give different pictures.
KINDS = [(s, c, g) for s in _SHAPES for c in _COLORS for g in _COLORS if c != g]

#: Sentences that are true for every picture. A word is at least one token, so 80 words exceed 77
#: tokens.
_EMPTY = (
    "There is no person in it and no dog and no cat.",
    "It was not shown before and it was not seen after.",
    "No one is walking or running from the left to the right.",
    "It is an image without words and without letters and numbers.",
    "Please look at it and choose what can be seen in it.",
    "How it was made is a question that has no answer here.",
    "One can not see where it was or when it was shown.",
    "The scene is not large and the moment is a small one.",
    "It has no street and no house and no boat and no tree.",
    "First one sees the top of it and last the bottom of it.",
)
_EMPTY_WORDS = 80


def make_captioned(seed: int, num_frames: int = 12, size: int = 64) -> dict[str, bytes]:
    """Returns the members of one sample by suffix: a picture and its caption.

    Every eighth sample has a video.
    """
    rng = np.random.RandomState(seed)
    shape, color, ground = KINDS[seed % len(KINDS)]
    caption = f"{_say_nothing(rng)} One {color} {shape} is in front of {ground}."
    frames = [_draw(rng, shape, color, ground, size) for _ in range(num_frames)]
    if seed % 8:
        return {"jpg": encode_image(frames[0]), "json": _to_json(caption=caption)}
    turns = [
        {"from": "human", "value": "<video>\nDescribe the video."},
        {"from": "gpt", "value": caption},
    ]
    return {"mp4": encode_video(frames), "json": _to_json(conversations=turns)}


def _to_json(**entry: Any) -> bytes:
    return json.dumps(entry).encode()


def _say_nothing(rng: np.random.RandomState) -> str:
    said: list[str] = []
    while len(" ".join(said).split()) < _EMPTY_WORDS:
        said += [_EMPTY[n] for n in rng.permutation(len(_EMPTY))[:2]]
    return " ".join(said)


def _draw(rng: np.random.RandomState, shape: str, color: str, ground: str, size: int) -> Any:
    picture = Image.new("RGB", (size, size), _COLORS[ground])
    side = rng.uniform(0.4, 0.7) * size
    x, y = rng.uniform(0, size - side, 2)
    box, pen = [x, y, x + side, y + side], ImageDraw.Draw(picture)
    if shape == "square":
        pen.rectangle(box, fill=_COLORS[color])
    elif shape == "circle":
        pen.ellipse(box, fill=_COLORS[color])
    else:
        corners = [(x, y + side), (x + side / 2, y), (x + side, y + side)]
        pen.polygon(corners, fill=_COLORS[color])
    return picture
