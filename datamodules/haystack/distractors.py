"""Where distractors stand around a needle."""

from abc import ABC, abstractmethod

import numpy as np


class Distractors(ABC):
    @abstractmethod
    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        """Frame numbers of the distractors, of a haystack with the needle at frame `needle`."""


class PeriodicDistractors(Distractors):
    """Every `period` frames before and after the needle, as the paper of V-NIAH-D says.

    There the period is the wavelength of a rotary angle, 2π·β^(2n/d) ≈ 200 frames for β = 1e6 and
    n/d = 16/128: where the positions of needle and distractors look alike to that angle.
    """

    def __init__(self, period: int):
        self.period = _checked(period)

    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        return [at for at in range(needle % self.period, frames, self.period) if at != needle]


class SingleDistractor(Distractors):
    """One distractor a period before or after the needle, as V-NIAH-D's code has it.

    On a coin's fall where both sides are in range; none where neither is.
    """

    def __init__(self, period: int):
        self.period = _checked(period)

    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        sides = [at for at in (needle - self.period, needle + self.period) if 0 <= at < frames]
        return [int(rng.choice(sides))] if sides else []


def _checked(period: int) -> int:
    if period < 1:
        raise ValueError(f"the period of distractors is {period} frames; set it to 1 or more")
    return period
