"""An example of a user's own data: clips with multiple-choice questions about them.

The films and the handwriting are those of `demo.py`. The films are made grey, and coloured cards
are shown over them: one card in some clips, two in the others, one after the other. "Which colour
is the card?" needs one frame with the card. "Which card comes first?" needs the order of the
frames too.

The held-out questions have options, and the answer is a letter. Half of those in training ask for
the colour in words instead, so a trained model answers both kinds. All options stand in the same
order, so a small model can learn them within minutes. Every letter is right equally often, so
without the frames an answer is a guess.
"""

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules.shards import demo
from datamodules.shards.demo import draw_card, read_digits, read_films
from datamodules.shards.synthetic import encode_video
from datamodules.visuals.frames import FrameReader

COLOURS = {name: demo.COLOURS[name] for name in ("red", "green", "blue", "yellow")}
#: The number of clips with one card, and with each of the 12 ordered pairs of cards, by split.
CLIPS = {"train": (48, 16), "val": (24, 2)}
_SOURCES = {"train": "train", "val": "test"}  # the splits of the demo that they are made of

_SIDE, _CARD, _ROOM = 128, 96, 160  # pixels: of a clip, of a card, and of the film it is cut from
_FRAMES, _FPS, _STEP = 32, 8, 3  # of a clip; every third frame of the film
_SHOWN = (6, 10)  # frames that a card is shown for; the end is excluded


class _Clip(NamedTuple):
    name: str
    frames: list[Image.Image]
    colours: tuple[str, ...]  # of its cards, in order

    @property
    def questions(self) -> list[tuple[str, str, str]]:
        """The questions about it: (text, colour that is the answer, category)."""
        if len(self.colours) == 1:
            return [("Which colour is the card?", self.colours[0], "colour")]
        return [
            ("Which card comes first?", self.colours[0], "order"),
            ("Which card comes last?", self.colours[1], "order"),
        ]


def write_example(output: Path, seed: int = 0) -> list[Path]:
    """Writes clips with `train.json` and `val.json` into a folder, and returns these two paths.

    The files are the same every time.

    Raises:
        ValueError: the folder is not empty, or a package with films or digits is not installed.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{str(output)!r} is there already; choose a new folder")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for number, split in enumerate(CLIPS):
        rng = np.random.RandomState(2 * seed + number)
        options = np.random.RandomState(seed).permutation(list(COLOURS)).tolist()
        make = _conversation if split == "train" else _questions
        entries = []
        for clip in _make_clips(split, rng):
            (output / f"{clip.name}.mp4").write_bytes(encode_video(clip.frames, _FPS))
            entries += make(clip, options, rng)
        path = output / f"{split}.json"
        path.write_text(json.dumps(entries, indent=1) + "\n")
        written.append(path)
    return written


def _make_clips(split: str, rng: np.random.RandomState) -> Iterator[_Clip]:
    """Yields the clips of a split. Every colour is equally often on a first card, and on a last."""
    reader = FrameReader(_ROOM, lambda times: list(range(len(times))))
    films = [reader.video(data).numpy() for _, data in read_films(_SOURCES[split])]  # t c h w
    inks = [ink for ink, _ in read_digits(_SOURCES[split])]
    single, repeats = CLIPS[split]
    alone = [(name,) for name in COLOURS] * (single // len(COLOURS))
    for number, colours in enumerate([*alone, *list(permutations(COLOURS, 2)) * repeats]):
        frames = _cut(films[number % len(films)], rng)
        for colour, (start, end) in zip(colours, _times(len(colours), rng), strict=True):
            card = draw_card(inks[rng.randint(len(inks))], COLOURS[colour], _CARD)
            x, y = rng.randint(_SIDE - _CARD + 1, size=2).tolist()
            for frame in frames[start:end]:
                frame.paste(card, (x, y))
        yield _Clip(f"{split}-{number:03d}", frames, colours)


def _cut(film: np.ndarray, rng: np.random.RandomState) -> list[Image.Image]:
    """Returns the frames of a random part of a film, cropped, perhaps mirrored, and grey."""
    start = rng.randint(len(film) - _STEP * (_FRAMES - 1))
    y, x = rng.randint(_ROOM - _SIDE + 1, size=2)
    part = film[start : start + _STEP * _FRAMES : _STEP, :, y : y + _SIDE, x : x + _SIDE]
    part = part[..., ::-1] if rng.randint(2) else part
    pictures = np.ascontiguousarray(part.transpose(0, 2, 3, 1))  # t c h w -> t h w c
    return [Image.fromarray(each).convert("L").convert("RGB") for each in pictures]


def _times(count: int, rng: np.random.RandomState) -> list[tuple[int, int]]:
    """Returns the first frame of each card, and the one after its last. Cards do not touch."""
    lengths = rng.randint(*_SHOWN, size=count)
    free = _FRAMES - int(lengths.sum())
    starts = np.sort(rng.choice(free + 1, size=count, replace=False))
    starts[1:] += lengths[:-1].cumsum()
    return list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))


def _conversation(
    clip: _Clip, options: list[str], rng: np.random.RandomState
) -> list[dict[str, Any]]:
    """Returns one entry: a conversation with all questions about a clip, in a random order."""
    asked = [clip.questions[n] for n in rng.permutation(len(clip.questions))]
    turns = [
        _in_words(text, right) if rng.randint(2) else _turns(text, right, options)
        for text, right, _ in asked
    ]
    return [_entry(clip, clip.name, [turn for pair in turns for turn in pair])]


def _questions(clip: _Clip, options: list[str], _: np.random.RandomState) -> list[dict[str, Any]]:
    """Returns one entry for each question about a clip, with the facts that scores read."""
    entries = []
    for number, (text, right, category) in enumerate(clip.questions):
        entry = _entry(clip, f"{clip.name}-{number}", _turns(text, right, options))
        letter = ascii_uppercase[options.index(right)]
        facts = {"options": options, "answer": letter, "category": category, "group": clip.name}
        entries.append({**entry, "question": facts})
    return entries


def _turns(text: str, right: str, options: list[str]) -> list[dict[str, str]]:
    lines = [f"{ascii_uppercase[n]}. {option}" for n, option in enumerate(options)]
    asked = "\n".join([text, *lines, "Answer with the letter."])
    return [
        {"from": "human", "value": asked},
        {"from": "gpt", "value": ascii_uppercase[options.index(right)]},
    ]


def _in_words(text: str, right: str) -> list[dict[str, str]]:
    """Returns a question without options, and its answer."""
    asked = text if "colour" in text else f"{text} Answer with its colour."
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": right.capitalize()}]


def _entry(clip: _Clip, name: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    turns[0]["value"] = f"<video>\n{turns[0]['value']}"
    return {"id": name, "video": f"{clip.name}.mp4", "conversations": turns}
