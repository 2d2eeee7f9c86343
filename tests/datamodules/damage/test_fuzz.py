"""Thousands of damaged shards: no crash, no hang, and no good sample lost or changed.

FUZZ_CASES is the number of cases (`make fuzz`), and FUZZ_SEED the first one. A case depends only on
its seed, so FUZZ_SEED=n FUZZ_CASES=1 repeats case n.

Cases run in forked processes, because a decoder written in C can crash its process.
"""

import faulthandler
import os
import random
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from datamodules.errors import BadSampleError
from datamodules.instruct import Sample, decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.stream.index import read_manifest
from datamodules.stream.loader import ShardReader
from datamodules.stream.reading.source import ForwardFile
from datamodules.stream.reading.tar import sample_offsets, untar_sample
from datamodules.visuals.container import MAX_BYTES
from datamodules.visuals.frames import FrameReader, UniformSampler
from tests.helpers.damage import KINDS, samples

CASES = int(os.environ.get("FUZZ_CASES", "200"))
FIRST = int(os.environ.get("FUZZ_SEED", "0"))
HANG_S = 60


@cache
def decoder() -> Callable[[dict], Sample]:
    read = FrameReader(16, UniformSampler(2))
    return partial(decode_sample, frames=read, conversation=ConversationEncoder(max_length=256))


def equal(one: Sample, other: Sample) -> bool:
    pairs = list(zip(one.visuals, other.visuals, strict=True))
    return (
        one.text == other.text
        and all(a.info == b.info for a, b in pairs)
        and all(torch.equal(a.frames, b.frames) for a, b in pairs)
    )


def run_case(seed: int, folder: Path) -> tuple[str, str]:
    """Returns (kind of damage, what is wrong with the result; empty if nothing)."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    data, touched = KINDS[kind](rng)
    path = folder / f"{seed}.tar"
    path.write_bytes(data)
    manifest = read_manifest(str(path))
    reader, good, reasons = ShardReader(manifest, 5.0), {}, Counter()
    for number in range(manifest.shards[0].count):
        try:
            raw = untar_sample(reader.read(0, number), "u")
            key = raw["__key__"]
            same = {s: d for s, d in raw.items() if s[:2] != "__"} == samples().get(key)
            if same and key in good:
                continue
            if not same or rng.random() < 0.2:  # equal bytes give equal samples
                sample = decoder()(raw)
                if same and not equal(sample, decoder()({**raw, **samples()[key]})):
                    return kind, f"{key} is decoded in two ways"
            if same:
                good[key] = raw
        except BadSampleError as error:
            reasons[error.reason] += 1
    reader.close()
    if missing := set(samples()) - touched - set(good):
        return kind, f"lost {sorted(missing)}: {manifest.faults}, {dict(reasons)}"
    sample_offsets(ForwardFile(iter([data])))  # in the order of a pipe
    path.unlink()
    path.with_name(path.name + ".idx").unlink(missing_ok=True)
    return kind, ""


def child(seeds: Sequence[int], folder: Path, results: int) -> None:
    """Writes one line before a case and one after it. SIGALRM ends the process at any point."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.disable()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        signal.alarm(HANG_S)
        os.write(results, f"start {seed}\n".encode())
        try:
            kind, wrong = run_case(seed, folder)
        except BaseException:
            kind, wrong = "?", " | ".join(traceback.format_exc().splitlines()[-5:])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > 1.25 * MAX_BYTES and not wrong:
            wrong = f"{grown} bytes of memory"
            before += grown >> 10
        os.write(results, f"end {seed} {kind}: {wrong}\n".encode())


def run_seeds(seeds: list[int], folder: Path) -> tuple[list[str], Counter]:
    """Returns the failures, and the number of cases by kind. A process that dies loses its case."""
    failures, kinds = [], Counter()
    while seeds:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                child(seeds, folder, write)
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as lines:
            at = None
            for line in lines:
                word, rest = line.rstrip("\n").split(" ", 1)
                at = int(rest) if word == "start" else None
                if word == "end":
                    head, _, wrong = rest.partition(": ")
                    seed, _, kind = head.partition(" ")
                    kinds[kind] += 1
                    failures += [f"{seed} ({kind}): {wrong}"] if wrong else []
        _, status = os.waitpid(pid, 0)
        if at is None:
            break
        died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "left"
        failures.append(f"{at}: the process ended with {died}")
        seeds = seeds[seeds.index(at) + 1 :]
    return failures, kinds


@pytest.mark.timeout(24 * 3600 if CASES > 1000 else 300)
def test_no_damage_costs_more_than_it_touches(tmp_path):
    samples(), decoder()  # made before the fork
    seeds = list(range(FIRST, FIRST + CASES))
    failures, kinds = run_seeds(seeds, tmp_path)
    print(f"\n{sum(kinds.values())} damaged shards: {dict(kinds)}")
    again = "\nReplay one: FUZZ_SEED=<number> FUZZ_CASES=1 make fuzz"
    assert not failures, f"{len(failures)} of {CASES} cases:\n" + "\n".join(failures[:40]) + again
    assert sum(kinds.values()) == CASES


def test_a_decoder_that_crashes_or_hangs_is_seen(tmp_path, monkeypatch):
    """The fuzz test would report them: this tests the fuzz test itself."""

    def broken(seed: int, folder: Path) -> tuple[str, str]:
        if seed == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        while seed == 2:
            pass
        return "none", "wrong" if seed == 3 else ""

    monkeypatch.setitem(globals(), "run_case", broken)
    monkeypatch.setitem(globals(), "HANG_S", 1)
    failures, kinds = run_seeds([0, 1, 2, 3, 4], tmp_path)
    assert failures == [
        "1: the process ended with SIGSEGV",
        "2: the process ended with SIGALRM",
        "3 (none): wrong",
    ]
    assert kinds == {"none": 3}
