"""Runs every benchmark of this folder and writes one table, `RESULTS.md`.

Ends with status 1 where a target is missed.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from harness import Row, table

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = {"harness", "published", "run"}


def main() -> int:
    rows: list[Row] = []
    names = sorted({script.stem for script in FOLDER.glob("*.py")} - NOT_BENCHMARKS)
    for done, name in enumerate(names, start=1):
        print(f"[{done}/{len(names)}] {name}", file=sys.stderr, flush=True)
        rows += import_module(name).run()
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    text = f"# What the shortcuts gain\n\nWritten by `make bench` on {machine}.\n\n{table(rows)}\n"
    (FOLDER / "RESULTS.md").write_text(text)
    print(text)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
