"""Computes the content of a report from runs: factors, ranking, canaries and sentences."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from experiments.command.overrides import short_keys
from experiments.reporting.data import ABSENT, Cell, Needle, Run
from lightning_modules.metrics.bootstrap import MeanInterval, bootstrap_interval

#: Titles of the shipped conditions. Other conditions are titled by their name.
CONDITIONS = {
    "plain": "V-NIAH, no distractors",
    "periodic": "V-NIAH-D, periodic distractors",
    "single": "V-NIAH-D, a single distractor",
}
REACHES = {"within": "at training length", "beyond": "beyond it"}

#: Least change of a logit, after a frame was replaced, that shows that the model sees the frame.
LEAST_LOGIT_CHANGE = 1e-5


class Column(NamedTuple):
    condition: str
    reach: str


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ only in their seed."""

    label: str
    runs: list[Run]
    index: int  # decides the group's colour in every chart

    @property
    def tested(self) -> list[Run]:
        return [run for run in self.runs if run.needle]


class SeededScore(NamedTuple):
    """A mean score over seeds.

    Attributes:
        interval: mean and confidence interval over needles, with all seeds pooled.
        seeds: mean of each seed.
    """

    interval: MeanInterval
    seeds: list[float]


@dataclass(frozen=True)
class Row:
    """One line of the ranking."""

    group: Group
    overall: SeededScore
    scores: dict[Column, SeededScore]
    blind: float
    ceiling: float


class Canary(NamedTuple):
    name: str
    proves: str
    passes: Callable[[Needle], bool]
    shows: Callable[[Needle], str]


def group_runs(runs: list[Run], axes: list[str]) -> list[Group]:
    """Groups the runs that differ only in their seed. Groups and runs keep their order."""
    settings = [axis for axis in axes if axis != "seed"]
    members: dict[str, list[Run]] = {}
    short = short_keys(settings)
    for run in runs:
        if len(settings) > 1:
            label = ", ".join(f"{short[axis]}={run.value(axis)}" for axis in settings)
        else:
            label = run.value(settings[0] if settings else "rotary")
        members.setdefault(run.folder.name if label == ABSENT else label, []).append(run)
    return [Group(label, runs, index) for index, (label, runs) in enumerate(members.items())]


def conditions_of(groups: list[Group]) -> dict[str, str]:
    """Returns the title of each condition that a run was tested under, shipped ones first."""
    runs = [run.needle for group in groups for run in group.tested if run.needle]
    tested = dict.fromkeys(name for needle in runs for name, cells in needle.cells.items() if cells)
    names = [name for name in dict.fromkeys([*CONDITIONS, *tested]) if name in tested]
    return {name: CONDITIONS.get(name, name) for name in names}


def columns_of(groups: list[Group]) -> list[Column]:
    """Returns the pairs of condition and reach for which at least one run has a cell."""
    columns = [Column(name, reach) for name in conditions_of(groups) for reach in REACHES]
    return [c for c in columns if any(cells_of(run, c) for g in groups for run in g.tested)]


def cells_of(run: Run, column: Column) -> list[Cell]:
    if run.needle is None:
        return []
    longest = run.needle.train_frames[1]
    return [
        cell
        for cell in run.needle.cells.get(column.condition, [])
        if (cell.frames > longest) == (column.reach == "beyond")
    ]


def rank(groups: list[Group]) -> list[Row]:
    """Returns one row for each tested group, the best mean over all cells first."""
    columns = columns_of(groups)
    rows = []
    for group in groups:
        if not group.tested:
            continue
        scores = {c: score([cells_of(run, c) for run in group.tested]) for c in columns}
        everything = [[x for c in columns for x in cells_of(run, c)] for run in group.tested]
        overall = score(everything)
        if overall is None:
            continue
        needles = [run.needle for run in group.tested if run.needle]
        rows.append(
            Row(
                group,
                overall,
                {column: s for column, s in scores.items() if s},
                blind=sum(n.blind.mean for n in needles) / len(needles),
                ceiling=sum(n.ceiling.mean for n in needles) / len(needles),
            )
        )
    return sorted(rows, key=lambda row: -row.overall.interval.mean)


def score(by_seed: list[list[Cell]]) -> SeededScore | None:
    """Returns the mean over the cells of all seeds. The bootstrap draws needles, not cells."""
    cells = [cell for seed in by_seed for cell in seed]
    if not cells:
        return None
    interval = bootstrap_interval([c.correct for c in cells], [c.needle for c in cells])
    return SeededScore(interval, [sum(c.correct for c in s) / len(s) for s in by_seed if s])


def _percent(share: float) -> str:
    """Formats a share in percent, rounded as in the table: 0.81 there is 81 % here."""
    return f"{float(f'{share:.2f}'):.0%}"


def headline(rows: list[Row]) -> str:
    """Returns the result of the report in one or two sentences."""
    if not rows:
        return "No run has been tested yet."
    best = rows[0]
    mean, low, high = best.overall.interval
    text = (
        f"{best.group.label} finds the needle in {_percent(mean)} of all cells "
        f"[{_percent(low)}, {_percent(high)}]; blind guessing gets {_percent(best.blind)}."
    )
    if len(rows) > 1:
        second = rows[1]
        apart = low > second.overall.interval.high
        verdict = "do not overlap" if apart else "overlap, this test cannot tell them apart"
        text += (
            f" Next is {second.group.label} with {_percent(second.overall.interval.mean)}: "
            f"the two intervals {verdict}."
        )
    return text


def cautions(runs: list[Run]) -> list[str]:
    """Returns warnings that a reader must know before comparing the rows."""
    notes = [f"No result of {run.folder}: {run.status}." for run in runs if not run.needle]
    notes += [
        f"The canary “{canary.name}” fails for {run.folder}: read the canaries before the ranking."
        for canary in CANARIES
        for run in runs
        if run.needle and not canary.passes(run.needle)
    ]
    needles = [run.needle for run in runs if run.needle]
    if len({n.train_frames for n in needles}) > 1:
        notes.append("The runs were trained on different numbers of frames.")
    grids = {
        (condition, frozenset((c.frames, c.depth, c.needle) for c in cells))
        for n in needles
        for condition, cells in n.cells.items()
    }
    if len(grids) > len({condition for condition, _ in grids}):
        notes.append("The runs were tested on different grids: their means are not comparable.")
    if len({n.seed for n in needles}) == 1:
        notes.append(
            "One seed: the intervals say how a model does on other needles, not how another "
            "training run would do."
        )
    return notes


CANARIES = [
    Canary(
        "blind",
        "The needle is taken out. A score above the commonest answer's share would mean that "
        "question or haystack give the answer away.",
        lambda n: n.blind.low <= n.majority,
        lambda n: f"{n.blind.mean:.2f} (commonest answer {n.majority:.2f})",
    ),
    Canary(
        "ceiling",
        "The needle is shown alone. Where this is no better than blind, the model cannot read "
        "needles, and the grid says nothing about finding them.",
        lambda n: n.ceiling.low > n.blind.high,
        lambda n: f"{n.ceiling.mean:.2f}",
    ),
    Canary(
        "sensitivity",
        "One frame in the middle of a haystack is changed. Logits that stay as they were mean "
        "that attention does not reach it, and every score at that depth is a guess.",
        lambda n: n.logit_change > LEAST_LOGIT_CHANGE,
        lambda n: f"{n.logit_change:.3g} (frame at {n.changed_at[1]:.0%} of {n.changed_at[0]})",
    ),
]
