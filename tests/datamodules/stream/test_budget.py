"""Batches by tokens: what a batch holds, equal in every layout."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from datamodules.shards.synthetic import write_shards
from datamodules.stream.budget import BudgetOrder, cut, halve
from datamodules.stream.index import join, read_manifest
from datamodules.stream.loader import Faults, StreamLoader
from datamodules.stream.mixture import Part, mix
from datamodules.stream.order import ShuffledOrder, StreamOptions
from experiments import train
from experiments.shards import main as shards
from lightning_modules.training.instruct import VideoLLMModule
from tests.datamodules.stream.test_order import rank_batches as read_batches
from tests.datamodules.stream.test_order import write_tar

OPTIONS = StreamOptions(seed=3, window=5, chunk=3)
BUDGET, MOST, PER_STEP = 300, 9, 4

#: (ranks, workers of each rank)
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns two sets of shards: `a` with 312 samples and `b` with 51."""
    folder = tmp_path_factory.mktemp("budget")
    for name, counts in {"a": [63, 1, 90, 47, 111], "b": [21, 30]}.items():
        (folder / name).mkdir()
        for n, count in enumerate(counts):
            write_tar(folder / name / f"{name}{n}.tar", count)
    return folder


@pytest.fixture(params=["set", "mixture"])
def source(request, folder):
    """Returns (manifest, order)."""
    return make_source(folder, request.param == "mixture")


def make_source(folder, mixed, max_tokens=BUDGET, most=MOST):
    sets = [read_manifest(str(folder / name)) for name in "ab"]
    manifest = join(sets) if mixed else sets[0]
    samples = ShuffledOrder(manifest, 1, OPTIONS)
    if mixed:
        # The smaller set is seen more often: the mixture has several of its epochs.
        parts = [Part("a", None, 1.0), Part("b", None, 1.0)]
        samples = mix(parts, sets, OPTIONS, 1, 1)
    return manifest, BudgetOrder(samples, lengths_of(manifest), max_tokens, most, PER_STEP)


def lengths_of(manifest):
    """Returns lengths: short, long, some over the budget, and bad samples without a length."""
    rng = np.random.RandomState(1)
    tokens = np.where(rng.rand(len(manifest)) < 0.3, 120, 20) + rng.randint(0, 60, len(manifest))
    tokens[::50], tokens[7::90] = 420, 0
    return tokens.astype(np.int32)


def tokens_by_place(manifest):
    places = [(n, sample) for n, count in enumerate(manifest.counts) for sample in range(count)]
    return dict(zip(places, lengths_of(manifest).tolist(), strict=True))


class Places:
    """Stands for a reader: gives the places of the samples of a micro-batch."""

    def __init__(self, order):
        self._order = order

    def __getitem__(self, m):
        return [row.order.locate(row.stream, row.row) for row in self._order.rows(m)], []

    def close(self):
        pass


def batches_of(order, rank=0, world=1, at=(0, 0)):
    """Returns what one rank gets of an epoch, from a place on."""
    options = {"rank": rank, "world": world, "position": lambda: at}
    return list(StreamLoader(lambda e: Places(order.epoch(e)), order, Faults("raise"), **options))


def in_order(ranks):
    """Returns the micro-batches of all ranks, in global order."""
    return [batch for row in zip(*ranks, strict=True) for batch in row]


def micro_batches(order, world=1, at=(0, 0)):
    return in_order([batches_of(order, rank, world, at) for rank in range(world)])


def test_layouts_give_identical_batches(source):
    """The samples are read from shards, also with workers."""

    def read(world, workers):
        return in_order(
            [read_batches(source, rank, world, workers, (1, 0)) for rank in range(world)]
        )

    alone = read(1, 0)
    assert len(alone) == len(source[1])
    assert len(alone) % PER_STEP == 0
    for world, workers in LAYOUTS[1:]:
        assert read(world, workers) == alone, (world, workers)


def test_a_run_cut_anywhere_goes_on_in_any_other_layout(source):
    """Twenty random stops: (ranks, step) -> ranks. The test above has the stops with workers."""
    rng = np.random.RandomState(0)
    order = source[1]
    whole = {epoch: micro_batches(order, at=(epoch, 0)) for epoch in range(3)}
    for n in range(20):
        epoch, before, after = n % 3, *(2 ** rng.randint(3, size=2)).tolist()
        done = PER_STEP * rng.randint(1 + len(order) // PER_STEP)
        seen = micro_batches(order, before, (epoch, 0))[:done]
        rest = micro_batches(order, after, (epoch, done))
        assert seen + rest == whole[epoch], (n, before, after, epoch, done)


@pytest.mark.parametrize("mixed", [False, True])
def test_no_batch_is_over_the_budget_unless_a_sample_is(folder, mixed):
    manifest, order = make_source(folder, mixed)
    known = tokens_by_place(manifest)
    longest = 0
    for epoch in range(4):
        for batch in micro_batches(order, at=(epoch, 0)):
            length = sum(known[key] for key in batch)
            assert length <= BUDGET or len(batch) == 1
            assert 1 <= len(batch) <= MOST
            longest = max(longest, length)
    assert longest == 420
    assert order.too_long == (lengths_of(manifest) > BUDGET).sum() > 0


def test_steps_are_more_even_in_tokens_than_by_count(folder):
    manifest, order = make_source(folder, False)
    known = tokens_by_place(manifest)

    def spread(order):
        sizes = [sum(known[key] for key in batch) for batch in batches_of(order)]
        steps = np.reshape(sizes, (-1, PER_STEP)).sum(1)
        return steps.std() / steps.mean()

    by_count = ShuffledOrder(manifest, 4, OPTIONS, PER_STEP)
    assert spread(order) < spread(by_count) / 2


def test_every_sample_once_but_the_tail(folder):
    manifest, order = make_source(folder, False)
    for epoch in range(6):
        batches = batches_of(order, at=(epoch, 0))
        assert len(batches) == len(order)
        keys = Counter(key for batch in batches for key in batch)
        assert set(keys.values()) == {1}
        # Samples that fill no step, and samples that only this epoch's order needs.
        needed = len(cut(order._tokens[order._epochs.epoch(epoch).numbers()], BUDGET, MOST)) - 1
        left = len(manifest) - len(keys)
        assert left <= max(needed - len(order), 0) * MOST + 16  # 16 of 48 streams at most
        assert needed - len(order) < 2 * PER_STEP


def test_numbers_are_the_samples_in_the_order_of_their_rows(folder):
    sets = [read_manifest(str(folder / name)) for name in "ab"]
    parts = [Part("a", None, 1.0), Part("b", None, 1.0)]
    streams = replace(OPTIONS, virtual_streams=7)
    for order, manifest in (
        (ShuffledOrder(sets[0], 1, OPTIONS), sets[0]),
        (ShuffledOrder(sets[0], 3, streams, 5), sets[0]),
        (mix(parts, sets, OPTIONS, 2, 4), join(sets)),
    ):
        first = np.cumsum(manifest.counts) - manifest.counts
        for epoch in map(order.epoch, range(3)):
            rows = [row for m in range(len(epoch)) for row in epoch.rows(m)]
            places = [row.order.locate(row.stream, row.row) for row in rows]
            expected = [first[shard] + sample for shard, sample in places]
            assert epoch.numbers().tolist() == expected


def test_samples_are_counted_where_batches_differ(source):
    _, order = source
    counts = [len(batch) for epoch in range(3) for batch in batches_of(order, at=(epoch, 0))]
    fresh = BudgetOrder(order._epochs, order._tokens, BUDGET, MOST, PER_STEP)
    for epoch, done in ((2, 5), (0, 0), (0, 7), (1, 0), (2, len(order)), (1, 3)):
        expected = sum(counts[: epoch * len(order) + done])
        assert fresh.samples_before(epoch, done) == order.samples_before(epoch, done) == expected


def test_samples_of_epochs_that_are_cut_short_are_counted(source):
    """`trainer.limit_train_batches` ends each epoch after its first batches."""
    _, order = source
    counts = [len(b) for epoch in range(4) for b in list(batches_of(order, at=(epoch, 0)))[:7]]
    short = BudgetOrder(order._epochs, order._tokens, BUDGET, MOST, PER_STEP)
    short.trained = 7
    for epoch, done in ((2, 5), (0, 3), (3, 1), (1, 0), (2, 7)):
        expected = sum(counts[: 7 * epoch + done])
        assert short.samples_before(epoch, done) == expected


def test_an_epoch_of_fewer_batches_is_filled_up():
    cuts = np.array([0, 1, 6, 9, 12])
    assert halve(cuts, 4).tolist() == cuts.tolist()
    assert halve(cuts, 5).tolist() == [0, 1, 3, 6, 9, 12]
    assert halve(cuts, 7).tolist() == [0, 1, 3, 6, 7, 9, 10, 12]
    assert halve(cuts, 12).tolist() == list(range(13))
    assert halve(cuts, 99).tolist() == list(range(13))


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_those_of_one_sample_after_the_other(seed):
    rng = np.random.RandomState(seed)
    tokens = rng.randint(0, 50, 200)
    batches = [[]]
    for n, length in enumerate(tokens):
        now = batches[-1]
        if now and (sum(tokens[now]) + length > 100 or len(now) == 6):
            batches.append([])
        batches[-1].append(n)
    assert cut(tokens, 100, 6).tolist() == [*(batch[0] for batch in batches), 200]


def test_too_few_for_a_step_is_one_line(folder):
    manifest = read_manifest(str(folder / "b"))
    with pytest.raises(
        ValueError, match=r"51 samples make \d micro-batches of 9999 .* 30 of one"
    ) as e:
        BudgetOrder(ShuffledOrder(manifest, 1, OPTIONS), lengths_of(manifest), 9999, 50, 30)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_training_that_is_stopped_inside_an_epoch_goes_on(compose, tmp_path, monkeypatch):
    """Through the program: the keys of every step, and the number of samples that it reports."""
    write_shards(tmp_path / "s", [20, 13], num_frames=4)
    shards(["measure", str(tmp_path / "s"), "--workers", "1"])
    words = [
        "experiment=resume_probe",
        "prepare=null",
        "logger=csv",
        "print_config=false",
        f"data.train={tmp_path / 's'}",
        "data.val=null",
        "data.batch_size=6",
        "data.global_batch_size=12",
        "data.stream.max_tokens=200",
        "data.stream.tokens_per_frame=4",
        "data.stream.num_workers=0",
        "module.packing=128",
        "trainer.max_epochs=2",
        "trainer.val_check_interval=null",
        "callbacks.checkpoint.every_n_steps=2",
        "callbacks.progress=null",
        "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false",
    ]

    def run(folder):
        train.main.__wrapped__(compose(words, folder))
        lines = (folder / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["keys"] for line in lines]

    def stop(module, batch, batch_idx):
        if module.trainer.global_step == 5:
            raise KeyboardInterrupt
        return step(module, batch, batch_idx)

    whole = run(tmp_path / "whole")
    assert len(whole) == 6  # of two epochs
    step = VideoLLMModule.training_step
    monkeypatch.setattr(VideoLLMModule, "training_step", stop)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert run(tmp_path / "cut") == whole
    assert len({len(keys) for keys in whole}) > 1
    assert max(map(len, whole)) <= 12
    done = [json.loads((tmp_path / name / "done.json").read_text()) for name in ("whole", "cut")]
    assert done[0]["samples"] == sum(map(len, whole)) == done[1]["samples"]
    assert done[0]["weights_sha256"] == done[1]["weights_sha256"]
