"""Says in sentences what a ranking shows: the headline, the limits of the test, and cautions."""

from math import isfinite

from experiments.reporting.data import Run
from experiments.reporting.measured import LOSS, NEEDLES
from experiments.reporting.tables import CANARIES, Comparison, Ranking

#: A test that needs more trainings a setting than this is not a matter of seeds.
_MOST_SEEDS = 20


def headline(ranking: Ranking | None) -> str:
    """Returns the result of the report: which setting is better, by how much, and how sure."""
    if ranking is None or not ranking.rows:
        return "No run has been tested or scored yet."
    if ranking.unlike:
        return (
            "The settings are not ranked, because their runs were not scored alike: "
            f"{'; '.join(ranking.unlike)}."
        )
    if len(ranking.rows) == 1:
        return _alone(ranking)
    if not ranking.comparisons:
        return f"The settings are not ranked: {ranking.metric} is neither better high nor low."
    if ranking.one_seed:
        return _one_seed(ranking)
    return _factors(ranking) if ranking.effects else _best(ranking)


def _alone(ranking: Ranking) -> str:
    row = ranking.rows[0]
    mean, low, high = row.overall.interval
    text = f"{row.group.label}: {named(ranking.metric)} {mean:.2f} [{low:.2f}, {high:.2f}]"
    if (blind := row.beside.get("blind")) is not None:
        text += f"; blind {blind:.2f}"
    return f"{text}. One setting makes no comparison."


def _one_seed(ranking: Ranking) -> str:
    first = ranking.with_best[0]
    interval = first.difference.over_samples
    return (
        f"One seed makes no ranking: another training can exchange the places. With this seed, "
        f"{first.first} is {_by(ranking, first)} [{interval.low:.2f}, {interval.high:.2f}] "
        f"than {first.second} in {named(ranking.metric)}, and the interval is over "
        f"{_units(ranking)[1]} alone. Run at least three seeds (seed=0,1,2)."
    )


def _best(ranking: Ranking) -> str:
    compared = ranking.with_best
    best, metric = compared[0].first, named(ranking.metric)
    sure = [c for c in compared if c.sure]
    unsure = [c for c in compared if not c.sure]
    if not unsure:
        first = compared[0]
        rest = "" if len(compared) == 1 else "every other setting; the next is "
        return (
            f"{best} is better in {metric} than {rest}{first.second}: {_by(ranking, first)}, "
            f"interval {_interval(first)}, with {_counts(ranking)}."
        )
    names, first = _list([best, *(c.second for c in unsure)]), unsure[0]
    text = f"{names} cannot be told apart in {metric} with {_counts(ranking)}: "
    if first.difference.mean == 0.0:
        text += f"{best} and {first.second} have the same mean, interval {_interval(first)}."
    else:
        text += f"{best} is ahead of {first.second} by {_size(first)}, "
        text += f"interval {_interval(first)}. {needed(first, _units(ranking)[0])}"
    if sure:
        text += f" {best} is better than {_list([c.second for c in sure])}."
    return text


def needed(comparison: Comparison, unit: str, trainings: str = "seeds") -> str:
    """Returns a sentence on how many samples and seeds would show a difference of this size.

    Args:
        unit: name of a sample.
        trainings: what the pairs of trainings are called; those of a factor are not only seeds.
    """
    difference = comparison.difference
    samples, runs = difference.needed()
    now = len(difference.by_run)
    if not isfinite(samples):
        return "They have the same mean."
    if runs > _MOST_SEEDS:
        return f"It is far smaller than what seeds change: {runs} {trainings} would be needed."
    count = max(samples, difference.samples) if runs > now else samples
    seeds = f" and {runs} {trainings}" if runs > now else ""
    wanted = f"{rounded(count)} {unit}s{seeds}"
    return f"About {wanted} would do, if the difference is as large as it seems."


def limits(ranking: Ranking) -> str:
    """Returns how small a difference this many samples and seeds can show."""
    errors = sorted(c.difference.smallest for c in ranking.comparisons)
    if not errors:
        return ""
    middle = errors[len(errors) // 2]
    if not middle > 0:
        return f"With {_counts(ranking)}, no difference varies, so no limit can be computed."
    trainings = "one training" if ranking.one_seed else "these trainings"
    only = " (samples alone: one seed does not show how trainings differ)" * ranking.one_seed
    return (
        f"With {_counts(ranking)}, a true difference of about {middle:.2f} is found in 8 of 10 "
        f"such tests of {trainings}{only}. Smaller differences need more."
    )


def cautions(runs: list[Run], ranking: Ranking | None) -> list[str]:
    """Returns warnings that a reader must know before comparing the rows."""
    metric = ranking.metric if ranking else NEEDLES
    notes = [f"No result of {run.folder}: {run.status}." for run in runs if not run.measured]
    if missing := [run for run in runs if run.measured and metric not in run.measured]:
        notes += [f"{run.folder} has no {named(metric)}." for run in missing]
    if ranking and ranking.unlike:
        notes.append(f"Not scored alike, so not ranked: {'; '.join(ranking.unlike)}.")
    notes += [
        f"The canary “{canary.name}” fails for {run.folder}: read the canaries before the ranking."
        for canary in CANARIES
        for run in runs
        if run.needle and not canary.passes(run.needle)
    ]
    if len({run.needle.train_frames for run in runs if run.needle}) > 1:
        notes.append("The runs were trained on different numbers of frames.")
    if ranking:
        notes += _no_better_than_blind(ranking)
        once = [row.group.label for row in ranking.rows if len(row.overall.seeds) == 1]
        if ranking.one_seed and len(ranking.rows) > 1:
            notes.append("One seed: the order of the rows is no ranking.")
        elif len(ranking.rows) > 1:
            notes += [f"{label} has one seed, so it is not ranked." for label in once]
    steps = {run.scored_at or 0 for run in runs if run.measured}
    if len(steps) > 1:
        found = ", ".join(map(str, sorted(steps)))
        notes.append(f"The runs were scored after different numbers of steps: {found}.")
    return notes


def _no_better_than_blind(ranking: Ranking) -> list[str]:
    labels = [
        row.group.label
        for row in ranking.rows
        if (d := row.over_null.get("blind")) and d.over_samples.low <= 0
    ]
    if not labels or ranking.metric == LOSS:
        return []
    return [
        f"{'; '.join(labels)}: no better than without frames (blind), as far as these questions "
        "show. The questions may be answered without the video, or the model does not use it."
    ]


def named(metric: str) -> str:
    return "the share of needles found" if metric == NEEDLES else metric


def verdict(comparison: Comparison) -> str:
    """Returns how sure a comparison is, in words."""
    if comparison.sure:
        return "better"
    return "one seed" if comparison.difference.one_run else "not sure"


def rounded(count: float) -> str:
    """Returns a number with two significant digits: 187 -> 190."""
    return f"{int(float(f'{count:.2g}')):,}"


def _factors(ranking: Ranking) -> str:
    """Returns a sentence for each factor: its best value against the next one."""
    sentences = []
    for factor, compared in ranking.effects.items():
        best = _first_of_all(compared)
        if best is None:
            continue
        sure = [c for c in compared if c.first == best and c.sure]
        unsure = [c for c in compared if c.first == best and not c.sure]
        if sure:
            closest = sure[-1]
            sentences.append(
                f"{factor}: {best} is better than {_list([c.second for c in sure])}, by "
                f"{_size(closest)}, interval {_interval(closest)}{' at least' * (len(sure) > 1)}."
            )
        if unsure:
            closest = unsure[-1]
            sentences.append(
                f"{factor}: {_list([best, *(c.second for c in unsure)])} cannot be told apart "
                f"({closest.difference.mean:+.2f}, interval {_interval(closest)}). "
                f"{needed(closest, _units(ranking)[0], 'pairs of trainings')}"
            )
    sentences.append(
        f"The differences are in {named(ranking.metric)}, averaged over the other settings, with "
        f"{_counts(ranking)}."
    )
    return " ".join(sentences)


def _first_of_all(compared: list[Comparison]) -> str | None:
    """Returns the value that is ahead of all others; None if there is a circle."""
    behind = {c.second for c in compared}
    return next((c.first for c in compared if c.first not in behind), None)


def _units(ranking: Ranking) -> tuple[str, str]:
    example = ranking.example
    clusters = {answer.cluster for answer in example.answers}
    several = len(clusters) < len(example.answers)
    return example.unit, f"{example.cluster_unit if several else example.unit}s"


def _counts(ranking: Ranking) -> str:
    """Returns such as `72 questions about 12 videos and 3 seeds`."""
    example = ranking.example
    clusters = len({answer.cluster for answer in example.answers})
    text = f"{len(example.answers):,} {example.unit}s"
    if clusters < len(example.answers):
        text += f" about {clusters:,} {example.cluster_unit}{'s' * (clusters > 1)}"
    seeds = min(len(row.overall.seeds) for row in ranking.rows)
    return f"{text} and {seeds} seed{'s' * (seeds > 1)}"


def _by(ranking: Ranking, comparison: Comparison) -> str:
    lower = ranking.example.higher_is_better is False
    return f"{_size(comparison)} {'lower' if lower else 'higher'}"


def _size(comparison: Comparison) -> str:
    return f"{abs(comparison.difference.mean):.2f}"


def _interval(comparison: Comparison) -> str:
    _, low, high = comparison.difference.interval
    return f"[{low:+.2f}, {high:+.2f}]"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
