"""Private names of Hydra and of OmegaConf, its container of configs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal import utils
from omegaconf import Node


@contextmanager
def report_first(report: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside the context, Hydra runs its work through `report` before it prints errors itself.

    Hydra prints errors in several lines, with a hint about tracebacks. Its function that prints
    them is the only place to change that.

    Args:
        report: takes the work, runs it, and handles the errors that it wants to handle.
    """
    original = utils.run_and_report

    def run(work: Callable[[], Any]) -> Any:
        return original(lambda: report(work))

    utils.run_and_report = run
    try:
        yield
    finally:
        utils.run_and_report = original


def combinations(overrides: Sequence[Any]) -> list[list[str]]:
    """Returns the words of each job of a sweep, as Hydra's basic sweeper makes them."""
    # Not at the head: Hydra looks for plugins in modules, and must not find this class here.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return [list(words) for words in jobs]


def root_of(node: Node) -> Any:
    """Returns the whole config that a node belongs to."""
    return node._get_root()
