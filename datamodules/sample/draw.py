"""Random numbers of a sample, for rotary schemes whose settings are random in training."""

from collections.abc import Sequence
from dataclasses import replace

from datamodules.batch import Visual
from datamodules.common.digest import number


def with_draws(visuals: Sequence[Visual], *origin: object) -> list[Visual]:
    """Returns the visuals, each with a random number in [0, 1) as its `draw`.

    The numbers depend only on `origin` (such as seed, epoch and sample key) and on the visual's
    place in the sample. So they are the same for every number of workers and after every resume.
    """
    words = " ".join(map(str, origin))
    return [
        replace(visual, info=visual.info._replace(draw=_uniform(f"{words} {place}")))
        for place, visual in enumerate(visuals)
    ]


def _uniform(words: str) -> float:
    return ((number(words) + 2**63) >> 11) / 2**53  # 64 signed bits -> 53 unsigned
