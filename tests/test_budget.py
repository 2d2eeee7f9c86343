"""Batches by tokens: what is measured, what a batch then holds, the same in every layout."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_order import rank_batches as read_batches
from test_order import write_tar

from datamodules.batch import VISUAL_SLOT
from datamodules.budget import BudgetOrder, cut, halve
from datamodules.conversation import ConversationEncoder
from datamodules.frames import FpsSampler, FrameReader, UniformSampler
from datamodules.index import index_path, info_path, join, lengths_path, read_counts, read_manifest
from datamodules.instruct import InstructDataModule
from datamodules.lengths import read_lengths, read_tokens
from datamodules.mixture import Part, mix
from datamodules.order import ShuffledOrder, StreamOptions
from datamodules.pack import write_shard
from datamodules.stream import Faults, StreamLoader
from datamodules.synthetic import make_sample, write_shards
from experiments import train
from experiments.shards import main as shards
from lightning_modules.video_llm import VideoLLMModule

OPTIONS = StreamOptions(seed=3, window=5, chunk=3)
BUDGET, MOST, PER_STEP = 300, 9, 4

#: (ranks, workers of each)
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of shards, `a` of 312 samples and `b` of 51."""
    folder = tmp_path_factory.mktemp("budget")
    for name, counts in {"a": [63, 1, 90, 47, 111], "b": [21, 30]}.items():
        (folder / name).mkdir()
        for n, count in enumerate(counts):
            write_tar(folder / name / f"{name}{n}.tar", count)
    return folder


@pytest.fixture(params=["set", "mixture"])
def source(request, folder):
    """(manifest, order)"""
    return make_source(folder, request.param == "mixture")


def make_source(folder, mixed, max_tokens=BUDGET, most=MOST):
    sets = [read_manifest(str(folder / name)) for name in "ab"]
    manifest = join(sets) if mixed else sets[0]
    samples = ShuffledOrder(manifest, 1, OPTIONS)
    if mixed:
        # The smaller set is seen more often: several of its epochs in one of the mixture.
        parts = [Part("a", None, 1.0), Part("b", None, 1.0)]
        samples = mix(parts, sets, OPTIONS, 1, 1)
    return manifest, BudgetOrder(samples, lengths_of(manifest), max_tokens, most, PER_STEP)


def lengths_of(manifest):
    """Short and long ones, some longer than the budget, and bad ones of no length."""
    rng = np.random.RandomState(1)
    tokens = np.where(rng.rand(len(manifest)) < 0.3, 120, 20) + rng.randint(0, 60, len(manifest))
    tokens[::50], tokens[7::90] = 420, 0
    return tokens.astype(np.int32)


def tokens_by_place(manifest):
    places = [(n, sample) for n, count in enumerate(manifest.counts) for sample in range(count)]
    return dict(zip(places, lengths_of(manifest).tolist(), strict=True))


class Places:
    """Where the samples of a micro-batch stand, which are not read."""

    def __init__(self, order):
        self._order = order

    def __getitem__(self, m):
        return [row.order.locate(row.stream, row.row) for row in self._order.rows(m)], []

    def close(self):
        pass


def batches_of(order, rank=0, world=1, at=(0, 0)):
    """What one rank gets of an epoch, from a place on."""
    options = {"rank": rank, "world": world, "position": lambda: at}
    return list(StreamLoader(lambda e: Places(order.epoch(e)), order, Faults("raise"), **options))


def in_order(ranks):
    """Micro-batches of all ranks, in global order."""
    return [batch for row in zip(*ranks, strict=True) for batch in row]


def micro_batches(order, world=1, at=(0, 0)):
    return in_order([batches_of(order, rank, world, at) for rank in range(world)])


def test_layouts_give_identical_batches(source):
    """Samples read from shards, by workers too."""

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
    """Twenty random cuts: (ranks, step) -> ranks; those with workers are in the test above."""
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
        # What fills no step, and what this epoch's order needs more than the first one's.
        needed = len(cut(order._tokens[order._epochs.epoch(epoch).numbers()], BUDGET, MOST)) - 1
        left = len(manifest) - len(keys)
        assert left <= max(needed - len(order), 0) * MOST + 16  # 16: of 48 streams at most
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


# --- lengths -------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    write_shards(tmp_path / "s", [9, 4, 7], num_frames=8)
    assert shards(["measure", str(tmp_path / "s"), "--workers", "1"]) == 0
    return tmp_path / "s"


def data(folder, sampler=None, **options):
    options = {"max_tokens": 120, "tokens_per_frame": 4.0, "seed": 1} | options
    frames = FrameReader(32, sampler or UniformSampler(4))
    stream = StreamOptions(**options)
    return InstructDataModule(
        str(folder), None, frames, ConversationEncoder, 6, 12, stream, audit=False
    )


def test_measured_lengths_are_those_of_batches(measured):
    """A pooler that leaves 4 tokens of a frame; videos, pairs of images and text alone."""
    module = data(measured)
    manifest = read_manifest(str(measured))
    tokens = read_tokens(manifest, UniformSampler(4), module._options)
    known = {f"{n:09d}": length for n, length in enumerate(tokens.tolist())}
    seen = 0
    for batch in module.train_dataloader():
        slots = (batch.input_ids == VISUAL_SLOT).sum(1)
        counts, at = batch.frame_counts, 0
        for row, key in enumerate(batch.keys):
            mine = counts[at : at + int(slots[row])]
            at += len(mine)
            length = int(batch.attention_mask[row].sum()) - len(mine) + 4 * sum(mine)
            assert known[key.rpartition("/")[2]] == length
            seen += 1
    assert seen >= 16


@pytest.mark.parametrize("sampler", [UniformSampler(5), FpsSampler(2.0, 9, 2), FpsSampler(30.0, 6)])
def test_samplers_count_what_they_take(sampler):
    rng = np.random.RandomState(0)
    videos = [np.cumsum(rng.uniform(0.01, 0.5, rng.randint(1, 80))) for _ in range(60)]
    frames = np.array([len(video) for video in videos])
    seconds = np.array([video[-1] - video[0] for video in videos])
    taken = [len(sampler(video.tolist())) for video in videos]
    assert sampler.count(frames, seconds).tolist() == taken


def test_images_and_bad_samples_have_lengths_too(tmp_path):
    entries = [(f"{n}", make_sample(n, 8)) for n in range(4)]
    broken = dict(entries[0][1], mp4=b"no video" * 50)
    write_shard(tmp_path / "x.tar", [*entries, ("broken", broken)])
    assert shards(["measure", str(tmp_path / "x.tar"), "--json"]) == 1
    lengths = read_lengths(read_manifest(str(tmp_path / "x.tar")).shards[0])
    assert lengths.visuals.tolist() == [1, 2, 1, 0, 0]
    assert lengths.frames.tolist() == [8, 0, 0, 8]
    assert lengths.text[-1] == 0 < lengths.text[:4].min()
    tokens = lengths.tokens(UniformSampler(16), 0.5, 10.0)
    assert (tokens - lengths.text).tolist() == [8, 20, 8, 0, 0]


def test_lengths_that_are_missing_or_of_another_shard_are_one_line(measured):
    first = sorted(measured.glob("*.tar"))[0]
    place = lengths_path(index_path(first))

    def refused():
        with pytest.raises(ValueError, match=r"run: ropelab-shards measure .*000000\.tar") as error:
            data(measured).train_dataloader()
        assert "\n" not in str(error.value)
        return str(error.value)

    place.write_bytes(lengths_path(index_path(first.with_name("shard-000001.tar"))).read_bytes())
    assert "lengths of 4 samples, the shard has 9" in refused()
    place.write_bytes(b"no numbers")
    assert "cannot be read" in refused()
    place.unlink()
    assert "has none" in refused()
    write_shards(measured, [9])
    assert not place.exists()


def test_lengths_lie_where_the_index_can(tmp_path):
    """Of a folder that cannot be written, in the cache for both."""
    (path,) = write_shards(tmp_path / "s", [3], num_frames=4)
    index_path(path).unlink()
    cache = tmp_path / "cache"
    path.parent.chmod(0o555)
    try:
        code = shards(["measure", str(path), "--index-cache", str(cache), "--workers", "1"])
        beside = list(path.parent.glob("*.len"))
    finally:
        path.parent.chmod(0o755)
    assert code == 0
    manifest = read_manifest(str(path), cache=cache)
    assert len(read_lengths(manifest.shards[0]).text) == 3
    assert len([*cache.glob("*.len"), *beside]) == 1


def test_measuring_leaves_the_counts_of_a_folder_in_use(tmp_path):
    """They are passed over where the folder is newer, and every index is opened then."""
    write_shards(tmp_path / "s", [3, 2], num_frames=4)
    info = info_path(str(tmp_path / "s"))
    info.parent.mkdir()
    counts = {"shard-000000.tar": 3, "shard-000001.tar": 2}
    info.write_text(json.dumps({"shard_counts": counts}))
    assert read_counts(str(tmp_path / "s")) == counts
    assert shards(["measure", str(tmp_path / "s"), "--workers", "1"]) == 0
    assert len([*(tmp_path / "s").glob("*.len")]) == 2
    assert read_counts(str(tmp_path / "s")) == counts


def test_the_place_of_a_checkpoint_knows_the_budget(measured):
    """Other tokens, other batches: a checkpoint of these is refused."""
    prints = [
        data(measured).fingerprint(),
        data(measured, max_tokens=121).fingerprint(),
        data(measured, tokens_per_frame=5.0).fingerprint(),
        data(measured, tokens_per_image=9.0).fingerprint(),
        data(measured, sampler=UniformSampler(5)).fingerprint(),
        data(measured, max_tokens=None).fingerprint(),
    ]
    assert len(set(prints)) == len(prints)
    assert data(measured).fingerprint() == prints[0]
    state = {"fingerprint": prints[0], "epoch": 0, "micro_batches": 2, "faults": {}}
    data(measured).load_state_dict(state)
    with pytest.raises(ValueError, match="settings of the data changed"):
        data(measured, max_tokens=121).load_state_dict(state)


def test_samples_that_are_too_long_are_said_once(measured, caplog):
    options = data(measured)._options
    longest = read_tokens(read_manifest(str(measured)), UniformSampler(4), options).max()
    module = data(measured, max_tokens=int(longest) - 1)
    module.train_dataloader()
    module.train_dataloader()
    said = [r.getMessage() for r in caplog.records if "max_tokens" in r.getMessage()]
    assert len(said) == 1
    line = f"of 20 samples are longer than data.stream.max_tokens={longest - 1}, up to {longest}:"
    assert line in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "data.stream.max_tokens is 0; set"),
        ({"max_tokens": 9, "tokens_per_frame": None}, "needs data.stream.tokens_per_frame"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **options)


def test_a_sampler_that_cannot_count_is_one_line(measured):
    with pytest.raises(ValueError, match="function has no `count`"):
        data(measured, sampler=lambda times: [0]).train_dataloader()


@pytest.mark.slow
def test_a_training_that_is_stopped_inside_an_epoch_goes_on(compose, tmp_path, monkeypatch):
    """Through the program: the keys of every step, and the samples that it says to have seen."""
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
        "+trainer.enable_progress_bar=false",
        "+trainer.enable_model_summary=false",
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
