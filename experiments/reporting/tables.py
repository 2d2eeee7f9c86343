"""Computes the tables of a report from runs: groups, scores, comparisons, factors and canaries."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from experiments.command.overrides import short_keys
from experiments.reporting.compare import Difference, against, compare, holm
from experiments.reporting.data import ABSENT, Run
from experiments.reporting.measured import (
    LOSS,
    NEEDLES,
    Answer,
    Measured,
    Needle,
    differences,
    interval_of,
)
from lightning_modules.metrics.bootstrap import MeanInterval

#: Titles of the shipped conditions of a needle test. Others are titled by their name.
CONDITIONS = {
    "plain": "V-NIAH, no distractors",
    "periodic": "V-NIAH-D, periodic distractors",
    "single": "V-NIAH-D, a single distractor",
}
REACHES = {"within": "at training length", "beyond": "beyond it"}

#: Least change of a logit, after a frame was replaced, that shows that the model sees the frame.
LEAST_LOGIT_CHANGE = 1e-5

#: A comparison with a smaller p-value, after Holm's correction, is called sure.
SURE_BELOW = 0.05


class Column(NamedTuple):
    """A part of the samples: a condition and a reach of a needle test, or a category."""

    part: str
    kind: str

    @property
    def title(self) -> str:
        words = (CONDITIONS.get(self.part, self.part), REACHES.get(self.kind, self.kind))
        return ", ".join(word for word in words if word) or "other"


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ only in their seed."""

    label: str
    runs: list[Run]
    index: int  # decides the group's colour in every chart

    @property
    def tested(self) -> list[Run]:
        return [run for run in self.runs if run.needle]

    def scored(self, metric: str) -> dict[str, Measured]:
        """Returns what each run scored in a metric, by seed; runs without it are left out."""
        return {
            f"{run.value('seed')} {number}": run.measured[metric]
            for number, run in enumerate(self.runs)
            if metric in run.measured and run.measured[metric].answers
        }


class SeededScore(NamedTuple):
    """A mean score over seeds.

    Attributes:
        interval: mean and confidence interval over clusters of samples, with all seeds pooled.
        seeds: mean of each seed.
    """

    interval: MeanInterval
    seeds: list[float]


@dataclass(frozen=True)
class Row:
    """One line of the ranking.

    Attributes:
        beside: means of all seeds by name, such as `blind`.
        over_null: by condition, how much better the model is than itself under this condition.
        places: best and worst place that the comparisons leave open; None: there is no ranking.
    """

    group: Group
    overall: SeededScore
    scores: dict[Column, SeededScore]
    beside: dict[str, float]
    over_null: dict[str, Difference]
    places: tuple[int, int] | None = None


class Comparison(NamedTuple):
    """Two settings, or two values of a factor, on the same samples. `first` has the higher mean."""

    first: str
    second: str
    difference: Difference
    chance: float  # p-value after Holm's correction
    sure: bool  # the first is better; one seed never makes it sure


@dataclass(frozen=True)
class Ranking:
    """Everything that a page says about one metric.

    Attributes:
        metric: its name.
        rows: the best mean first; in the order of the groups if there is no ranking.
        unlike: why the runs cannot be compared; empty: they can.
        comparisons: of all pairs of settings.
        effects: by factor, of all pairs of its values, averaged over the other factors.
    """

    metric: str
    rows: list[Row]
    unlike: list[str]
    comparisons: list[Comparison]
    effects: dict[str, list[Comparison]]

    @property
    def one_seed(self) -> bool:
        """Whether too few settings have several seeds to rank them."""
        several = sum(len(row.overall.seeds) > 1 for row in self.rows)
        return several < min(2, len(self.rows))

    @property
    def with_best(self) -> list[Comparison]:
        """The comparisons of the best setting with each other one, in the order of the rows."""
        best = self.rows[0].group.label if self.rows else ""
        found = {c.second: c for c in self.comparisons if c.first == best}
        return [c for row in self.rows if (c := found.get(row.group.label))]

    @property
    def example(self) -> Measured:
        """What some run measured. Names of units are the same in all."""
        return next(iter(self.rows[0].group.scored(self.metric).values()))


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


def metrics_of(groups: list[Group]) -> list[str]:
    """Returns the metrics that a run was scored in, the most telling first."""
    runs = sorted((run for group in groups for run in group.runs), key=lambda r: -len(r.measured))
    found = dict.fromkeys(metric for run in runs for metric in run.measured)
    directed = {
        name
        for group in groups
        for run in group.runs
        for name, measured in run.measured.items()
        if measured.higher_is_better is not None
    }
    return sorted(found, key=lambda name: (name != NEEDLES, name == LOSS, name not in directed))


def conditions_of(groups: list[Group]) -> dict[str, str]:
    """Returns the title of each condition of the needle tests, shipped ones first."""
    columns = columns_of(groups, NEEDLES)
    return {c.part: CONDITIONS.get(c.part, c.part) for c in columns}


def columns_of(groups: list[Group], metric: str) -> list[Column]:
    """Returns the parts of the samples that some run has; none if there is only one part."""
    answers = [a for g in groups for m in g.scored(metric).values() for a in m.answers]
    parts = dict.fromkeys([*CONDITIONS, *(a.part for a in answers)])
    kinds = dict.fromkeys([*REACHES, *(a.kind for a in answers)])
    known = {(a.part, a.kind) for a in answers}
    columns = [Column(p, k) for p in parts for k in kinds if (p, k) in known]
    return columns if len(columns) > 1 or metric == NEEDLES else []


def rank(groups: list[Group], axes: Sequence[str], metric: str) -> Ranking:
    """Ranks the settings by a metric, and compares them pair by pair."""
    shown = [group for group in groups if group.scored(metric)]
    all_measured = [m for group in shown for m in group.scored(metric).values()]
    unlike = differences(all_measured, axes)
    rows = [_row(group, metric, columns_of(groups, metric)) for group in shown]
    if unlike or any(m.higher_is_better is None for m in all_measured):
        return Ranking(metric, rows, unlike, [], {})
    lower = any(m.higher_is_better is False for m in all_measured)
    rows.sort(key=lambda row: row.overall.interval.mean if lower else -row.overall.interval.mean)
    many = [row for row in rows if len(row.overall.seeds) > 1]
    several = len(many) > 1
    ranked = many if several else rows  # one seed is not ranked beside several
    rows = [*ranked, *(row for row in rows if row not in ranked)]
    pairs = {
        (a.group.label, b.group.label): _pairs(a.group, b.group, metric)
        for a, b in combinations(ranked, 2)
    }
    compared = _corrected({labels: compare(pair) for labels, pair in pairs.items()}, several)
    found = effects([row.group for row in ranked], axes, metric, several)
    ranking = Ranking(metric, rows, [], compared, found)
    if ranking.one_seed or len(rows) < 2:
        return ranking
    placed = [_placed(row, ranking) if row in ranked else row for row in rows]
    return Ranking(metric, placed, [], compared, ranking.effects)


def _row(group: Group, metric: str, columns: list[Column]) -> Row:
    scored = list(group.scored(metric).values())
    parts = {c: score([in_column(m.answers, c) for m in scored]) for c in columns}
    overall = score([measured.answers for measured in scored])
    assert overall is not None
    names = dict.fromkeys(name for measured in scored for name in measured.beside)
    beside = {name: [m.beside[name].mean for m in scored if name in m.beside] for name in names}
    nulls = dict.fromkeys(name for measured in scored for name in measured.nulls)
    over_null = {}
    for name in nulls if scored[0].higher_is_better is not None else ():
        pairs = [against(m, m.nulls[name]) for m in scored if name in m.nulls]
        asked = {frozenset(answer.key for answer in one.answers) for one, _ in pairs}
        if len(asked) == 1 and all(asked):  # else the seeds were asked about other samples
            over_null[name] = compare(pairs)
    means = {name: sum(values) / len(values) for name, values in beside.items()}
    return Row(group, overall, {c: s for c, s in parts.items() if s}, means, over_null)


def in_column(answers: Iterable[Answer], column: Column) -> list[Answer]:
    return [a for a in answers if (a.part, a.kind) == column]


def score(by_seed: list[list[Answer]]) -> SeededScore | None:
    """Returns the mean over the samples of all seeds. The bootstrap draws clusters of samples."""
    answers = [answer for seed in by_seed for answer in seed]
    if not answers:
        return None
    return SeededScore(interval_of(answers), [interval_of(s).mean for s in by_seed if s])


def _pairs(first: Group, second: Group, metric: str) -> list[tuple[Measured, Measured]]:
    """Returns the trainings of two settings in pairs: of one seed where both have it."""
    one, other = (
        {seed.partition(" ")[0]: m for seed, m in group.scored(metric).items()}
        for group in (first, second)
    )
    common = [seed for seed in one if seed in other]
    if common:
        return [(one[seed], other[seed]) for seed in common]
    return list(zip(one.values(), other.values(), strict=False))


def _corrected(found: dict[tuple[str, str], Difference], several_seeds: bool) -> list[Comparison]:
    chances = holm([difference.chance for difference in found.values()])
    return [
        Comparison(
            first,
            second,
            difference,
            chance,
            sure=several_seeds and not difference.one_run and chance < SURE_BELOW,
        )
        for ((first, second), difference), chance in zip(found.items(), chances, strict=True)
    ]


def _placed(row: Row, ranking: Ranking) -> Row:
    label = row.group.label
    below = sum(c.second == label and c.sure for c in ranking.comparisons)
    above = sum(c.first == label and c.sure for c in ranking.comparisons)
    places = (1 + below, len(ranking.rows) - above)
    return Row(row.group, row.overall, row.scores, row.beside, row.over_null, places)


def effects(
    groups: list[Group], axes: Sequence[str], metric: str, several_seeds: bool
) -> dict[str, list[Comparison]]:
    """Compares the values of each factor, if the ablation has several factors.

    Trainings are paired that are alike in everything else: the other factors and the seed. So each
    other setting counts alike. A value without a partner in some setting is left out there.
    """
    factors = [axis for axis in axes if axis != "seed"]
    if len(factors) < 2:
        return {}
    runs = [run for group in groups for run in group.runs if run.measured.get(metric)]
    found: dict[str, list[Comparison]] = {}
    for factor in factors:
        others = [axis for axis in [*factors, "seed"] if axis != factor]
        by_value: dict[str, dict[tuple[str, ...], Measured]] = {}
        for run in runs:
            place = tuple(run.value(axis) for axis in others)
            by_value.setdefault(run.value(factor), {})[place] = run.measured[metric]
        compared = {}
        for first, second in combinations(by_value, 2):
            places = [place for place in by_value[first] if place in by_value[second]]
            if not places:
                continue
            pair = [(by_value[first][place], by_value[second][place]) for place in places]
            if (difference := compare(pair)).mean < 0:
                first, second = second, first
                difference = compare([(b, a) for a, b in pair])
            compared[first, second] = difference
        if compared:
            ordered = sorted(compared.items(), key=lambda item: -item[1].mean)
            found[factor] = _corrected(dict(ordered), several_seeds)
    return found


class Canary(NamedTuple):
    name: str
    proves: str
    passes: Callable[[Needle], bool]
    shows: Callable[[Needle], str]


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
