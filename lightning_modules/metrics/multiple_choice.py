"""Scores for multiple choice, from the likelihood of the letters or from generated text."""

from string import ascii_uppercase

from datamodules.batch import Task
from lightning_modules.metrics.answers import parse as parsing
from lightning_modules.metrics.base import Answered, Score


class LikeliestLetter(Score):
    """Computes the share of questions whose right letter is the most likely option letter.

    The probability of a letter is that of its first token right after the prompt, as at the start
    of an answer in the chat template. Nothing is generated, so nothing needs parsing.
    """

    names = ("mc_likelihood",)

    def asks(self, task: Task | None) -> bool:
        return task is not None and bool(task.options)

    def row(self, answered: Answered) -> tuple[float, ...]:
        assert answered.task is not None
        likeliest = answered.options.index(max(answered.options))
        return (float(ascii_uppercase[likeliest] == answered.task.answers[0]),)


class GeneratedLetter(Score):
    """Computes the share of questions whose greedily generated answer names the right letter.

    An answer that names no letter or several letters is wrong; `mc_unparsed` is the share of such
    answers.
    """

    names = ("mc_generated", "mc_unparsed")
    lower_is_better = frozenset({"mc_unparsed"})
    parser = f"parse_letter {parsing.VERSION}"

    def __init__(self, max_new_tokens: int = 16) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens

    def asks(self, task: Task | None) -> bool:
        return task is not None and bool(task.options)

    def row(self, answered: Answered) -> tuple[float, ...]:
        assert answered.task is not None
        letter = self.parse(answered)
        return float(letter == answered.task.answers[0]), float(letter is None)

    def parse(self, answered: Answered) -> str | None:
        assert answered.task is not None
        said = answered.said(self.max_new_tokens)
        return parsing.parse_letter(said, len(answered.task.options))
