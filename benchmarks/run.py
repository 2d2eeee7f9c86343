"""Runs every benchmark of this folder and writes one table, `RESULTS.md`.

Ends with status 1 if a target is missed.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from harness import Row, table

FOLDER = Path(__file__).parent
NOT_BENCHMARKS = {"harness", "published", "run"}

#: Notes below the table. The published code was measured unchanged, on the same machine, with one
#: thread.
NOTES = """\
## How to read two of the lines

**Positions.** The baseline is a loop over the tokens in Python. It was written for this table to
check the results, and no training runs it. Against the functions that VideoRoPE published, which
are tensor operations too, the gain is 6.5 to 14 x at 100,006 tokens (0.6 to 0.8 ms for 4.8 to
10.8 ms), and 2.3 to 3.6 x at 2,048 tokens.

**Needle test.** Its rows are short (192 frames of 4 tokens) and have no distractors. Against the
loop that VideoRoPE published, on 100 and 300 frames of 32 tokens, 6 depths and 5 needles:

| grid | ours | published | gain |
| --- | --- | --- | --- |
| without distractors | 61.4 s | 71.2 s | 1.16 x faster |
| with the distractor of the published code | 83.4 s | 66.7 s | 0.80 x: ours is slower |
| peak memory of the process, both grids | 3,189 MiB | 785 MiB | 4.06 of it |

The predictions are the same in all 60 cells of each grid. A distractor before the needle ends what
its cells have in common, so less is shared; and the prefix is copied for each needle. Rows of more
than 65,536 tokens in all are read one after the other instead, without copies: see the lines on
2,900 frames.
"""


def main() -> int:
    rows: list[Row] = []
    names = sorted({script.stem for script in FOLDER.glob("*.py")} - NOT_BENCHMARKS)
    for done, name in enumerate(names, start=1):
        print(f"[{done}/{len(names)}] {name}", file=sys.stderr, flush=True)
        rows += import_module(name).run()
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    head = f"# What the shortcuts gain\n\nWritten by `make bench` on {machine}."
    text = f"{head}\n\n{table(rows)}\n\n{NOTES}"
    (FOLDER / "RESULTS.md").write_text(text)
    print(text)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
