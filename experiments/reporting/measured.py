"""Reads what a run scored, sample by sample: cells of a needle test, and answers to questions.

A report ranks every metric that is read here in the same way. Conditions, categories and names come
from the files; none is left out because it is not known.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.run.files import inside
from lightning_modules.metrics.answers import FULL
from lightning_modules.metrics.bootstrap import MeanInterval, bootstrap_interval

#: Name of the metric of a needle test.
NEEDLES = "needles"
#: Name of the metric that every validation with scores has: the mean over labelled tokens.
LOSS = "loss"

#: What the numbers of two runs must have in common, unless a factor of the ablation explains it:
#: a field of `scores.json`, and beginnings of the factors that may change it.
_MAY_DIFFER = {
    "frames": ("data", "tiles", "encoder", "model.encoder"),
    "chat_template": ("llm", "model.llm", "data.conversation"),
    "max_length": ("data", "llm"),
    "max_prompt_length": ("data", "encoder", "model.encoder"),
}
_MUST_AGREE = ("data", "generation")

_FILE = re.compile(r"step-(\d+)(?:-(.+))?\.jsonl")


class Cell(NamedTuple):
    """One square of a needle test: a question about one needle at one depth of one haystack."""

    frames: int
    depth: float
    needle: int
    correct: bool
    said: str = ""  # the likeliest token at each place of the answer

    def key(self, condition: str) -> str:
        place = f"{self.frames} frames, depth {self.depth:.0%}"
        return f"{condition}, {place}, needle {self.needle}"


@dataclass(frozen=True)
class Needle:
    """The result of the needle test of one run."""

    rotary: str
    seed: int
    step: int
    train_frames: tuple[int, int]  # fewest and most frames of a training sample
    cells: dict[str, list[Cell]]  # by condition: plain, periodic, single
    blind: MeanInterval
    ceiling: MeanInterval
    majority: float  # score of always giving the most common answer
    logit_change: float
    changed_at: tuple[int, float]  # frames and depth of the frame that was changed
    computed: int  # tokens run through the LLM, with the haystack's prefix shared
    recomputed: int  # tokens if every cell had been run by itself
    asked: dict[int, tuple[str, str]] = field(default_factory=dict)  # prompt and answer by needle

    def said(self) -> dict[str, dict[str, Any]]:
        """Returns what the model said in each cell, as `read_answers` returns it for a sample."""
        return {
            cell.key(condition): {
                "step": self.step,
                "key": cell.key(condition),
                "prompt": self.asked[cell.needle][0],
                "right": [self.asked[cell.needle][1]],
                "answer": cell.said,
            }
            for condition, cells in self.cells.items()
            for cell in cells
            if cell.needle in self.asked
        }


class Answer(NamedTuple):
    """The value of a metric for one sample.

    Attributes:
        key: names the sample; equal in all runs.
        cluster: samples of one cluster depend on one another: one needle, or one video.
        part, kind: where a report shows it: a condition and a reach, or a category of questions.
        weight: terms of the mean that the value stands for.
    """

    key: str
    value: float
    cluster: str
    part: str = ""
    kind: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Measured:
    """The values of one metric of one run.

    Attributes:
        unit, cluster_unit: names of a sample and of a cluster, such as question and video.
        nulls: answers of the same run under other conditions, by condition, such as `blind`.
        references: means by name that stand beside the result, such as `ceiling`.
        settings: what the numbers depend on, by name, as text.
    """

    metric: str
    higher_is_better: bool | None
    answers: list[Answer]
    unit: str
    cluster_unit: str
    nulls: dict[str, list[Answer]] = field(default_factory=dict)
    references: dict[str, MeanInterval] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> dict[str, MeanInterval]:
        """Means with intervals that stand beside the result: nulls and references."""
        return {name: interval_of(answers) for name, answers in self.nulls.items()} | (
            self.references
        )


def interval_of(answers: Iterable[Answer]) -> MeanInterval:
    """Returns the mean and its bootstrap interval over clusters."""
    answers = list(answers)
    return bootstrap_interval(
        [a.value for a in answers], [a.cluster for a in answers], [a.weight for a in answers]
    )


def needles_measured(needle: Needle) -> Measured:
    """Returns the cells of a needle test as answers. The clusters are needles."""
    longest = needle.train_frames[1]
    answers = [
        Answer(
            key=cell.key(condition),
            value=float(cell.correct),
            cluster=str(cell.needle),
            part=condition,
            kind="beyond" if cell.frames > longest else "within",
        )
        for condition, cells in needle.cells.items()
        for cell in cells
    ]
    references = {"blind": needle.blind, "ceiling": needle.ceiling}
    return Measured(NEEDLES, True, answers, "cell", "needle", references=references)


def read_needle(path: Path) -> Needle | None:
    if not path.is_file():
        return None
    advice = "run ropelab-evaluate on this run again"
    try:
        return _parse_needle(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON; {advice}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; {advice}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of a needle test ({error}); {advice}") from error


def _parse_needle(raw: dict[str, Any]) -> Needle:
    canaries = raw["canaries"]
    sensitivity = canaries["sensitivity"]
    low, high = raw["protocol"]["train_frames"]
    return Needle(
        rotary=raw["rotary"],
        seed=raw["seed"],
        step=raw["step"],
        train_frames=(low, high),
        cells={
            condition: [
                Cell(c["frames"], c["depth"], c["needle"], c["correct"], str(c.get("said", "")))
                for c in result["cells"]
            ]
            for condition, result in raw["conditions"].items()
        },
        blind=MeanInterval(canaries["blind"]["mean"], *canaries["blind"]["interval"]),
        ceiling=MeanInterval(canaries["ceiling"]["mean"], *canaries["ceiling"]["interval"]),
        majority=canaries["blind"]["majority"],
        logit_change=sensitivity["max_logit_change"],
        changed_at=(sensitivity["frames"], sensitivity["depth"]),
        computed=raw["token_forwards"]["computed"],
        recomputed=raw["token_forwards"]["recomputed"],
        asked={
            int(needle): (str(facts["prompt"]), str(facts["answer"]))
            for needle, facts in raw.get("asked", {}).items()
        },
    )


def read_answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of the last validation in `answers/`, by condition.

    Raises:
        ValueError: a file is damaged, or leads out of the run.
    """
    answers = inside(folder, "answers")
    if not answers.is_dir():
        return {}
    found = [(path, match) for path in answers.iterdir() if (match := _FILE.fullmatch(path.name))]
    last = max((int(match[1]) for _, match in found), default=None)
    files = {m[2] or FULL: path for path, m in sorted(found) if int(m[1]) == last}
    return {name: _lines(inside(folder, f"answers/{p.name}")) for name, p in files.items()}


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Returns the validations of scores.json; none if there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        validations = json.loads(path.read_text())
        for validation in validations:
            _ = validation["step"], [row["name"] for row in validation["scores"]]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of validations; remove it") from error
    return validations


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            line["values"] = {str(n): float(v) for n, v in line["values"].items()}
            line |= {name: str(line[name]) for name in ("key", "category", "group", "prompt")}
            line |= {"log_prob": float(line["log_prob"]), "tokens": int(line["tokens"])}
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not an answer") from error
        lines.append(line)
    return lines


def scores_measured(
    answers: dict[str, list[dict[str, Any]]], validations: list[dict[str, Any]]
) -> dict[str, Measured]:
    """Returns every score of the last validation that has a value for each sample, and the loss.

    Args:
        answers: as `read_answers` returns them.
        validations: content of scores.json.
    """
    lines = answers.get(FULL, [])
    if not lines:
        return {}
    about = [v for v in validations if v["step"] == lines[0]["step"]]
    about = next((v for v in about if v.get("condition", FULL) == FULL), {"scores": []})
    facts = {row["name"]: row for row in about["scores"]}
    names = dict.fromkeys(name for line in lines for name in line["values"])
    measured = {}
    for name in [*names, LOSS]:
        by_condition = {c: _values(name, said) for c, said in answers.items()}
        row = facts.get(name, {"higher_is_better": False if name == LOSS else None})
        settings = {key: about[key] for key in (*_MUST_AGREE, *_MAY_DIFFER) if key in about}
        settings |= {key: row[key] for key in ("parser", "max_new_tokens") if row.get(key)}
        measured[name] = Measured(
            name,
            row.get("higher_is_better"),
            by_condition.pop(FULL),
            "question" if name != LOSS else "sample",
            "video",
            nulls={condition: a for condition, a in by_condition.items() if a},
            settings={key: _text(value) for key, value in settings.items()},
        )
    return measured


def _values(name: str, lines: list[dict[str, Any]]) -> list[Answer]:
    answers = []
    for line in lines:
        key, group = line["key"], line["group"] or line["key"]
        if name == LOSS and line["tokens"]:
            value, tokens = -line["log_prob"] / line["tokens"], float(line["tokens"])
            answers.append(Answer(key, value, group, kind=line["category"], weight=tokens))
        elif name in line["values"]:
            answers.append(Answer(key, line["values"][name], group, kind=line["category"]))
    return answers


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def differences(runs: list[Measured], factors: Iterable[str]) -> list[str]:
    """Returns what makes the numbers of these runs incomparable, as texts; empty: they compare.

    They must have the same samples and be judged in the same way. What a model reads of a sample
    may differ if the ablation is about that.
    """
    factors = list(factors)
    samples = {frozenset(answer.key for answer in run.answers) for run in runs}
    found = []
    if len(samples) > 1:
        common = len(frozenset.intersection(*samples))
        sizes = sorted({len(keys) for keys in samples})
        sizes_text = " or ".join(map(str, sizes))
        found.append(f"the runs have {sizes_text} {runs[0].unit}s, of which {common} are common")
    for name in dict.fromkeys(key for run in runs for key in run.settings):
        values = dict.fromkeys(run.settings.get(name, "none") for run in runs)
        explained = any(f.startswith(_MAY_DIFFER.get(name, ())) for f in factors)
        if len(values) > 1 and not explained:
            found.append(f"{name} differs: {' | '.join(_short(value) for value in values)}")
    return found


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
