"""Reads the rows that a W&B run has stored on disk, to compare them with those that were logged.

Each process that logs into a run writes its own transaction log,
`wandb/[offline-]run-<time>-<id>/run-<id>.wandb`. The format is W&B's own, so only tests read it.
"""

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


def find_fragments(folder: Path, run_id: str) -> list[Path]:
    """Returns the run's transaction logs below `folder`, oldest first."""
    found = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_rows(fragments: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yields every complete row in logging order; a nested value `b` under `a` is `a.b`."""
    for path in fragments:
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json"]
        command += ["--run-file", str(path), str(path.parents[1])]
        shown = subprocess.run(command, capture_output=True, check=True)
        for line in shown.stdout.splitlines():
            if b'"type":"history"' in line:
                yield json.loads(line)["history"]["item"]
