"""Samples with questions, for scores."""

import json
from typing import Any

import numpy as np
from PIL import Image

from datamodules.shards.synthetic import COLORS, encode_video


def make_question(seed: int, num_frames: int = 4, size: int = 64) -> dict[str, Any]:
    """Returns the members of a sample that asks for the color of a clip, with the right answer.

    Each clip has four questions: multiple choice, the two of a yes/no pair, and an open one.
    """
    clip, kind = divmod(seed, 4)
    rng = np.random.RandomState(clip)
    names = list(COLORS)
    color, other = rng.permutation(len(names))[:2]
    shades = rng.uniform(0.7, 1.0, num_frames)
    frames = [
        Image.new("RGB", (size, size), tuple(int(c * shade) for c in COLORS[names[color]]))
        for shade in shades
    ]
    if kind == 0:
        options = "".join(f"\n{chr(65 + n)}. {name}" for n, name in enumerate(names))
        asked = f"What color is shown?{options}\nAnswer with the letter."
        facts: dict[str, Any] = {"options": names, "answer": chr(65 + color)}
    elif kind == 3:
        asked, facts = "What color is shown?", {"answer": names[color]}
    else:
        asked = f"Is {names[color if kind == 1 else other]} shown? Answer yes or no."
        facts = {"answer": "yes" if kind == 1 else "no", "pair": f"clip {clip}"}
        facts["hallucinated"] = kind == 2
    turns = [
        {"from": "human", "value": f"<video>\n{asked}"},
        {"from": "gpt", "value": facts["answer"]},
    ]
    entry = json.dumps({"conversations": turns, "question": facts})
    return {"mp4": encode_video(frames), "json": entry.encode()}
