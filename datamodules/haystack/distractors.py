"""Chooses the frames of distractors around a needle."""

from abc import ABC, abstractmethod

import numpy as np


class Distractors(ABC):
    @abstractmethod
    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        """Returns the frame numbers of the distractors when the needle is at frame `needle`."""


class PeriodicDistractors(Distractors):
    """Puts a distractor every `period` frames before and after the needle, as in V-NIAH-D's paper.

    The paper's period is the wavelength of a rotary angle, 2π·β^(2n/d) ≈ 200 frames for β = 1e6
    and n/d = 16/128. At this distance, the angle is the same for the needle and a distractor.
    """

    def __init__(self, period: int):
        self.period = _checked(period)

    def places(self, needle: int, frames: int, rng: np.random.Generator) -> list[int]:
        return [at for at in range(needle % self.period, frames, self.period) if at != needle]


class SingleDistractor(Distractors):
    """Puts one distractor a period before or after the needle, as in V-NIAH-D's code.

    The side is random if both frames exist. If neither exists, there is no distractor.
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
