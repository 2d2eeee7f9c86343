"""Checks the run that `run=` names, and names the runs nearby if there is none."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from experiments.run.files import printable

#: Files and folders of a place that weights can be read from.
_MARKS = ("config.json", "config.yaml", "checkpoints", ".hydra", "meta.pt", "whole.json")

#: Most runs that a message lists, and that are looked at.
_SHOWN, _SEEN = 5, 200


def check_run(run: Path) -> None:
    """Checks that `run` may hold a model. What it holds is checked when it is opened.

    Raises:
        ValueError: there is no such path, or it is a folder of several runs.
    """
    if run.is_file() or any((run / mark).exists() for mark in _MARKS):
        return
    near = list(islice(_runs_near(run), _SEEN))
    if run.exists() and not near:
        return  # `open_saved` says what is missing
    why = "is no run" if run.exists() else "does not exist"
    told = f"run={printable(str(run))} {why}"
    if not near:
        raise ValueError(f"{told}: set run= to a run directory; ropelab-runs lists them")
    names = {printable(str(path)): None for path in near}
    shown = get_close_matches(str(run), names, _SHOWN, 0.0)
    alike = get_close_matches(str(run), names, 1)
    meant = f"did you mean run={alike[0]}? " if alike else ""
    more = f", and {len(near) - len(shown)} more" if len(near) > len(shown) else ""
    raise ValueError(f"{told}: {meant}nearby: {', '.join(shown)}{more}")


def _runs_near(run: Path) -> Iterator[Path]:
    """Yields run directories at most three levels below the nearest folder that exists."""
    folder = next((path for path in (run, *run.parents) if path.is_dir()), Path())
    if folder.resolve() in (Path.cwd(), Path.home(), Path(folder.resolve().anchor)):
        folder = Path(os.environ.get("ROPELAB_RUNS", "runs"))
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(folder.glob(f"{depth}/config.yaml")):
            if "evaluate" not in path.parts:
                yield path.parent
