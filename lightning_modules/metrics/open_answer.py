"""Scores for free-form answers: word overlap with a right answer."""

from torchmetrics.functional.text import squad

from datamodules.batch import Task
from lightning_modules.metrics.base import Answered, Score


class OpenAnswer(Score):
    """Computes SQuAD's exact match and word F1 with the closest right answer, from 0 to 1.

    Case, punctuation and articles are ignored (torchmetrics' own normalisation).
    """

    names = ("open_exact", "open_f1")
    parser = "torchmetrics squad"

    def __init__(self, max_new_tokens: int = 32) -> None:
        super().__init__()
        self.max_new_tokens = max_new_tokens

    def asks(self, task: Task | None) -> bool:
        return task is not None and not task.options and not task.pair

    def row(self, answered: Answered) -> tuple[float, ...]:
        assert answered.task is not None
        right = {"text": list(answered.task.answers), "answer_start": [0]}
        said = {"prediction_text": answered.said(self.max_new_tokens), "id": ""}
        percent = squad(said, {"answers": right, "id": ""})
        return percent["exact_match"].item() / 100, percent["f1"].item() / 100
