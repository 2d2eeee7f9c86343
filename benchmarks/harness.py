"""Times our code against a baseline, in turn and in one process.

The two take turns because the speed of a shared machine changes, and should change for both.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One line of the results table."""

    name: str
    ours: str
    baseline: str
    gain: str
    difference: str
    target: str
    met: bool


def compare(
    name: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    at_least: float,
    repeats: int = 3,
    tolerance: float = 1e-5,
) -> Row:
    """Times `ours` and `baseline`, after one unmeasured call of each.

    The gain is the ratio of the fastest calls, because other load disturbs them least. Medians are
    in brackets. The largest difference between the results must not exceed `tolerance`.
    """
    difference = largest_difference(ours(), baseline())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, taken in zip((ours, baseline), times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    best, median = [min(t) for t in times], [statistics.median(t) for t in times]
    gain = best[1] / best[0]
    return Row(
        name,
        *(f"{b:.3f} s ({m:.3f})" for b, m in zip(best, median, strict=True)),
        gain=f"{gain:.2f} x faster",
        difference=f"{difference:.0e}" if difference else "none",
        target=f"at least {at_least:g} x, " + (f"within {tolerance:.0e}" if tolerance else "equal"),
        met=gain >= at_least and difference <= tolerance,
    )


def at_most(name: str, ours: float, baseline: float, share: float, unit: str) -> Row:
    """Returns a row for a count or size of ours that must not exceed `share` of the baseline's."""
    return Row(
        name,
        f"{ours:,.0f} {unit}",
        f"{baseline:,.0f} {unit}",
        gain=f"{ours / baseline:.2f} of it",
        difference="",
        target=f"at most {share:g} of it",
        met=ours <= share * baseline,
    )


def largest_difference(ours: Any, baseline: Any) -> float:
    """Returns the largest difference between two tensors, or two equally long sequences of them."""
    if isinstance(ours, Tensor):
        return (ours.double() - baseline.double()).abs().max().item()
    differences = [largest_difference(*pair) for pair in zip(ours, baseline, strict=True)]
    return torch.tensor(differences).max().item()  # Python's own max could lose a NaN


def peak_memory(run: Callable[[], Any]) -> int:
    """Returns the peak bytes that `run` allocates, beyond the memory in use before.

    Counted at torch's allocator, so the number is the same in every call and on every machine.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events() if profile.profiler else []
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table."""
    head = ["benchmark", "ours", "baseline", "gain", "largest difference", "target", ""]
    lines = [head, ["---"] * len(head)]
    lines += [
        [r.name, r.ours, r.baseline, r.gain, r.difference, r.target, "ok" if r.met else "MISSED"]
        for r in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
