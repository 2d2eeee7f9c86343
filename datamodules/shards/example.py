"""An example of a user's own data: clips with multiple-choice questions about them.

The films and the handwriting are those of `demo.py`. In each clip two coloured cards are shown over
the film, one after the other. "Which colour does a card have?" needs one frame that shows a card.
"Which card comes first?" needs the order of the frames too.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules.shards import demo
from datamodules.shards.demo import draw_card, read_digits, read_films
from datamodules.shards.synthetic import encode_video
from datamodules.visuals.frames import FrameReader

#: Without brown and grey, which the films have too.
COLOURS = {name: demo.COLOURS[name] for name in list(demo.COLOURS)[:6]}
#: The number of clips of each split.
CLIPS = {"train": 48, "val": 20}
_SOURCES = {"train": "train", "val": "test"}  # the splits of the demo that they are made of

_SIDE, _CARD, _ROOM = 128, 96, 160  # pixels: of a clip, of a card, and of the film it is cut from
_FRAMES, _FPS, _STEP = 32, 8, 3  # of a clip; every third frame of the film
_SHOWN = (6, 10)  # frames that a card is shown for; the end is excluded
_OPTIONS = 4
_ROUNDS = 2  # conversations about a training clip


class _Clip(NamedTuple):
    name: str
    frames: list[Image.Image]
    colours: tuple[str, str]  # of the first card and the last


class _Question(NamedTuple):
    text: str
    options: list[str]
    letter: str
    category: str

    def asked(self) -> str:
        lines = [f"{a}. {option}" for a, option in zip(ascii_uppercase, self.options, strict=False)]
        return "\n".join([self.text, *lines, "Answer with the letter."])


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
        clips = []
        for clip in _make_clips(split, rng):
            (output / clip.name).write_bytes(encode_video(clip.frames, _FPS))
            clips.append(clip)
        entries = _conversations(clips, rng) if split == "train" else _questions(clips, rng)
        path = output / f"{split}.json"
        path.write_text(json.dumps(entries, indent=1) + "\n")
        written.append(path)
    return written


def _make_clips(split: str, rng: np.random.RandomState) -> Iterator[_Clip]:
    """Yields the clips of a split. Every colour is as often on a first card, and on a last one."""
    reader = FrameReader(_ROOM, lambda times: list(range(len(times))))
    films = [reader.video(data).numpy() for _, data in read_films(_SOURCES[split])]  # t c h w
    inks = [ink for ink, _ in read_digits(_SOURCES[split])]
    names = list(COLOURS)
    for number in range(CLIPS[split]):
        place, turn = number % len(names), 1 + number // len(names) % (len(names) - 1)
        colours = (names[place], names[(place + turn) % len(names)])
        frames = _cut(films[number % len(films)], rng)
        starts, lengths = _times(rng)
        for colour, start, length in zip(colours, starts, lengths, strict=True):
            card = draw_card(inks[rng.randint(len(inks))], COLOURS[colour], _CARD)
            corner = tuple(rng.randint(_SIDE - _CARD + 1, size=2).tolist())
            for frame in frames[start : start + length]:
                frame.paste(card, corner)
        yield _Clip(f"{split}-{number:02d}.mp4", frames, colours)


def _cut(film: np.ndarray, rng: np.random.RandomState) -> list[Image.Image]:
    """Returns the frames of a random part of a film, cropped and perhaps mirrored."""
    start = rng.randint(len(film) - _STEP * (_FRAMES - 1))
    y, x = rng.randint(_ROOM - _SIDE + 1, size=2)
    part = film[start : start + _STEP * _FRAMES : _STEP, :, y : y + _SIDE, x : x + _SIDE]
    part = part[..., ::-1] if rng.randint(2) else part
    return [Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in part]


def _times(rng: np.random.RandomState) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the first frame and the number of frames of both cards, with film between them."""
    lengths = tuple(rng.randint(*_SHOWN, size=2).tolist())
    free = _FRAMES - sum(lengths)
    first, last = sorted(rng.choice(free + 1, size=2, replace=False).tolist())
    return (first, lengths[0] + last), lengths


def _conversations(clips: Sequence[_Clip], rng: np.random.RandomState) -> list[dict[str, Any]]:
    """Returns conversations that ask all questions about a clip, in a random order."""
    letters = _letters(rng)
    entries = []
    for number in range(_ROUNDS):
        for clip in clips:
            questions = _ask(clip, rng, letters)
            turns = [(questions[n].asked(), questions[n].letter) for n in rng.permutation(4)]
            entries.append(_entry(clip, f"conversation-{number}", turns))
    return entries


def _questions(clips: Sequence[_Clip], rng: np.random.RandomState) -> list[dict[str, Any]]:
    """Returns one entry for each question, with the facts that scores read."""
    letters = _letters(rng)
    entries = []
    for clip in clips:
        for number, asked in enumerate(_ask(clip, rng, letters)):
            entry = _entry(clip, str(number), [(asked.asked(), asked.letter)])
            entry["question"] = {
                "options": asked.options,
                "answer": asked.letter,
                "category": asked.category,
                "group": Path(clip.name).stem,
            }
            entries.append(entry)
    return entries


def _entry(clip: _Clip, name: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for number, (question, answer) in enumerate(turns):
        said.append({"from": "human", "value": question if number else f"<video>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"id": f"{Path(clip.name).stem}-{name}", "video": clip.name, "conversations": said}


def _ask(
    clip: _Clip, rng: np.random.RandomState, letters: dict[str, Iterator[str]]
) -> list[_Question]:
    """Returns two questions about colours and two about the order.

    A question about a colour has one option that is on a card. A question about the order has both,
    so colours alone leave two options.
    """
    first, last = clip.colours
    others = [name for name in COLOURS if name not in clip.colours]
    made = []
    for text, right, known, category in (
        ("Which colour does a card have?", first, [], "colour"),
        ("Which colour does a card have?", last, [], "colour"),
        ("Which card comes first?", first, [last], "order"),
        ("Which card comes last?", last, [first], "order"),
    ):
        wrong = known + rng.permutation(others)[: _OPTIONS - 1 - len(known)].tolist()
        wrong = rng.permutation(wrong).tolist()
        letter = next(letters[category])
        place = ascii_uppercase.index(letter)
        made.append(_Question(text, [*wrong[:place], right, *wrong[place:]], letter, category))
    return made


def _letters(rng: np.random.RandomState) -> dict[str, Iterator[str]]:
    """Returns for each category the letters of right answers: each as often, in a random order."""

    def shuffled() -> Iterator[str]:
        for _ in count():
            yield from rng.permutation(list(ascii_uppercase[:_OPTIONS])).tolist()

    return {"colour": shuffled(), "order": shuffled()}
