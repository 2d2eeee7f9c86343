"""ropelab-shards: packs videos and annotations into shards, verifies and measures shards.

ropelab-shards pack --videos videos/ --annotations train.json --output shards/ --reencode 336
ropelab-shards verify shards/ --json
ropelab-shards measure shards/ --tokenizer Qwen/Qwen2-7B
ropelab-shards example my_videos/
ropelab-shards demo data/vniah
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from datamodules.errors import BadSampleError
from datamodules.shards.annotations.files import read_annotations
from datamodules.shards.annotations.media import Media
from datamodules.shards.demo import write_demo
from datamodules.shards.example import write_example
from datamodules.shards.measure import counts_stay_current, measure_shard
from datamodules.shards.pack import (
    BadItem,
    Outcome,
    pack_shard,
    plan_shards,
    verify_shard,
)
from datamodules.stream.index import expand_urls, read_manifest
from experiments.run.process import run_alone

_screen = Console(stderr=True)  # with --json, standard output has only the JSON


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-shards")
    options = _parser().parse_args(arguments)
    try:
        outcome = options.run(options)
        if outcome is None:
            return 0
    except (ValueError, OSError) as error:  # errors that the user can fix, in one line
        print(f"error: {error}", file=sys.stderr)
        return 2
    if getattr(options, "json", False):
        print(json.dumps(as_json(outcome)))
    else:
        show(outcome)
    return 1 if outcome.bad else 0


def pack(options: argparse.Namespace) -> Outcome:
    if not options.videos.is_dir():
        raise ValueError(
            f"no folder {str(options.videos)!r}; set --videos to the folder of the files"
        )
    # 1. The entries to pack
    entries = read_annotations(options.annotations)
    if not entries:
        raise ValueError(f"no entry in {str(options.annotations)!r}")
    # 2. The output folder. Old shards must not stay there: they would be read with the new ones.
    older = sorted(options.output.glob("shard-*.tar*"))
    if older and not options.overwrite:
        raise ValueError(f"{options.output} holds shards; choose another folder or --overwrite")
    for path in older:
        path.unlink()
    # 3. One task per shard
    tasks = plan_shards(entries, options.output, options.shard_size)
    media = Media(options.videos, options.follow_links)
    job = partial(
        pack_shard, media=media, short_side=options.reencode, ignored=options.ignore_field
    )
    return in_parallel(job, tasks, options.workers, "packing")


def verify(options: argparse.Namespace) -> Outcome:
    return in_parallel(verify_shard, expand_urls(options.paths), options.workers, "verifying")


def measure(options: argparse.Namespace) -> Outcome:
    manifest = read_manifest(options.paths, cache=options.index_cache)
    job = partial(measure_shard, tokenizer=options.tokenizer)
    with counts_stay_current(manifest.urls):
        outcome = in_parallel(job, list(manifest.shards), options.workers, "measuring")
    damaged = [BadItem(fault.shard, "", fault.reason, fault.detail) for fault in manifest.faults]
    outcome.add(Outcome(bad=damaged))
    return outcome


def demo(options: argparse.Namespace) -> None:
    for path in write_demo(options.output):
        print(path)


def example(options: argparse.Namespace) -> None:
    for path in write_example(options.output):
        print(path)


def in_parallel(
    job: Callable[[Any], Outcome], tasks: Sequence[Any], workers: int, word: str
) -> Outcome:
    """Runs all tasks with a progress bar and adds up the outcomes in the order of the tasks."""
    columns = (word, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if workers == 1 or len(tasks) == 1:
        with Progress(*columns, console=_screen) as bar:
            return _sum(job(task) for task in bar.track(tasks))
    with ProcessPoolExecutor(min(workers, len(tasks))) as pool:
        futures = [pool.submit(job, task) for task in tasks]  # forks before the bar's thread runs
        with Progress(*columns, console=_screen) as bar:
            for _ in bar.track(as_completed(futures), total=len(futures)):
                pass
        return _sum(future.result() for future in futures)


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    total = Outcome()
    for outcome in outcomes:
        total.add(outcome)
    return total


def as_json(outcome: Outcome) -> dict:
    return {
        "good": outcome.good,
        "bad": dict(sorted(Counter(item.reason for item in outcome.bad).items())),
        "items": [
            {"shard": item.shard, "key": item.key, "reason": item.reason, "detail": item.detail}
            for item in outcome.bad
        ],
    }


def show(outcome: Outcome, most: int = 50) -> None:
    """Prints the totals by reason, and the first `most` bad items."""
    console = Console()
    table = Table("samples", "number", title="shards")
    table.add_row("good", str(outcome.good))
    for reason, number in as_json(outcome)["bad"].items():
        table.add_row(reason, str(number))
    console.print(table)
    for item in outcome.bad[:most]:
        line = BadSampleError(item.reason, item.detail, shard=item.shard, key=item.key)
        console.print(escape(str(line)), soft_wrap=True)
    if len(outcome.bad) > most:
        console.print(f"and {len(outcome.bad) - most} more; --json lists all")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ropelab-shards",
        description="Packs videos and annotations into shards; verifies and measures shards.",
    )
    commands = parser.add_subparsers(required=True)
    workers = min(8, os.cpu_count() or 1)

    writer = commands.add_parser("pack", help="videos and LLaVA annotations -> shards")
    writer.add_argument(
        "--videos", type=Path, required=True, help="folder that file names are relative to"
    )
    writer.add_argument("--annotations", type=Path, required=True, help=".json list or .jsonl")
    writer.add_argument("--output", type=Path, required=True, help="folder for the shards")
    writer.add_argument("--shard-size", type=_positive, default=256, help="entries a shard")
    writer.add_argument("--workers", type=_positive, default=workers, help="processes")
    writer.add_argument(
        "--reencode",
        type=_positive,
        metavar="SHORT_SIDE",
        help="re-encode videos as H.264 with a keyframe every 8 frames",
    )
    writer.add_argument(
        "--follow-links", action="store_true", help="read links that lead out of --videos"
    )
    writer.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="FIELD",
        help="ignore this field",
    )
    writer.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    writer.set_defaults(run=pack)

    reader = commands.add_parser("verify", help="read every sample of some shards fully")
    reader.add_argument("paths", nargs="+", metavar="PATHS", help="files, folders, globs, urls")
    reader.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    reader.add_argument("--workers", type=_positive, default=workers, help="processes")
    reader.set_defaults(run=verify)

    reader = commands.add_parser(
        "measure", help="store the lengths of samples, for data.stream.max_tokens"
    )
    reader.add_argument("paths", nargs="+", metavar="PATHS", help="files, folders, globs, urls")
    reader.add_argument(
        "--tokenizer",
        help="hub id, folder or .gguf of the LLM's tokenizer (default: the built-in one)",
    )
    reader.add_argument("--index-cache", type=Path, help="as data.stream.index_cache")
    reader.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    reader.add_argument("--workers", type=_positive, default=workers, help="processes")
    reader.set_defaults(run=measure)

    writer = commands.add_parser("example", help="videos and annotations to try `pack` with")
    writer.add_argument("output", type=Path, metavar="DIR", help="a new folder for the videos")
    writer.set_defaults(run=example)

    writer = commands.add_parser("demo", help="haystacks and needles from installed packages")
    writer.add_argument("output", type=Path, metavar="DIR", help="folder for the shards")
    writer.set_defaults(run=demo)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
