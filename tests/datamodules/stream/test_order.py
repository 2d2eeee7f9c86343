"""The samples of a step: equal in every layout and after every stop, for sets and mixtures."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import BadSampleError
from datamodules.stream.index import Manifest, Shard, index_path, join, read_manifest
from datamodules.stream.loader import EpochStream, Faults, ShardReader, StreamLoader
from datamodules.stream.mixture import Part, count_quotas, mix, read_parts
from datamodules.stream.order import FileOrder, ShuffledOrder, StreamOptions

OPTIONS = StreamOptions(seed=3, virtual_streams=12, window=5, chunk=3)
BATCH, PER_STEP = 2, 12

#: (ranks, workers of each rank)
LAYOUTS = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (4, 0), (4, 1), (6, 0)]
LAYOUTS += [(12, 0)]


def write_tar(path: Path, count: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for n in range(count):
            info = tarfile.TarInfo(f"{path.stem}-{n:04d}.json")
            info.size = 3
            tar.addfile(info, io.BytesIO(b"{ }"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Returns two sets of shards: `a` with 112 samples and `b` with 31."""
    folder = tmp_path_factory.mktemp("order")
    for name, counts in {"a": [23, 1, 40, 17, 31], "b": [11, 20]}.items():
        (folder / name).mkdir()
        for n, count in enumerate(counts):
            write_tar(folder / name / f"{name}{n}.tar", count)
    return folder


@pytest.fixture(params=["set", "mixture"])
def source(request, folder):
    """Returns (manifest, order)."""
    sets = [read_manifest(str(folder / name)) for name in "ab"]
    if request.param == "set":
        return sets[0], ShuffledOrder(sets[0], BATCH, OPTIONS, PER_STEP)
    parts = [Part("a", None, 1.0), Part("b", None, 0.5)]
    return join(sets), mix(parts, sets, OPTIONS, BATCH, PER_STEP)


def rank_batches(source, rank=0, world=1, workers=0, at=(0, 0)) -> list[list[str]]:
    """Returns what one rank gets of an epoch, from a place on. A batch is the list of its keys."""
    manifest, order = source
    loader = StreamLoader(
        lambda e: EpochStream(manifest, order.epoch(e), lambda raw: raw["__key__"], list, 30.0),
        order,
        Faults("raise"),
        rank=rank,
        world=world,
        num_workers=workers,
        position=lambda: at,
    )
    batches = list(loader)
    assert len(batches) == len(loader) - at[1] // world
    return batches


def steps(source, world: int, workers: int, at=(0, 0)) -> list[list[str]]:
    """Returns the keys of each optimizer step of an epoch, in global order."""
    ranks = [rank_batches(source, rank, world, workers, at) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [batch for row in zip(*ranks, strict=True) for batch in row]
    keys = [key for batch in batches for key in batch]
    size = BATCH * PER_STEP
    assert len(keys) % size == 0
    return [keys[first : first + size] for first in range(0, len(keys), size)]


def test_layouts_give_identical_steps(source):
    alone = steps(source, 1, 0, (1, 0))
    assert len(alone) == len(source[1]) // PER_STEP > 0
    for world, workers in LAYOUTS[1:]:
        assert steps(source, world, workers, (1, 0)) == alone, (world, workers)


def test_a_run_cut_anywhere_goes_on_in_any_other_layout(source):
    """Fifty random stops: (layout, step) -> layout. A few layouts have workers."""
    rng = np.random.RandomState(0)
    whole = {epoch: steps(source, 1, 0, (epoch, 0)) for epoch in range(3)}
    in_process = [layout for layout in LAYOUTS if not layout[1]]
    for n in range(50):
        epoch, cut = rng.randint(3), rng.randint(1 + len(whole[0]))
        seen = whole[epoch]
        if n % 17 == 0:  # the test above has shown the others
            seen = steps(source, *LAYOUTS[rng.randint(len(LAYOUTS))], (epoch, 0))
        layouts = LAYOUTS if n % 17 == 0 else in_process
        after = layouts[rng.randint(len(layouts))]
        rest = steps(source, *after, (epoch, cut * PER_STEP))
        assert seen[:cut] + rest == whole[epoch], (n, after, epoch, cut)


def test_every_sample_once_but_the_tail(folder):
    manifest = read_manifest(str(folder / "a"))
    for options, per_step in ((OPTIONS, 12), (OPTIONS, 5), (StreamOptions(virtual_streams=7), 1)):
        order = ShuffledOrder(manifest, BATCH, options, per_step)
        keys = Counter(key for batch in rank_batches((manifest, order)) for key in batch)
        assert set(keys.values()) == {1}
        assert len(keys) == len(order) * BATCH
        tail = len(manifest) - len(keys)
        assert 0 <= tail < (order.streams + per_step) * BATCH
        assert len(order) % per_step == 0
    assert len(keys) == 112  # 56 micro-batches fill 7 streams


def test_epochs_differ_and_leave_out_different_samples(source):
    first, second = (rank_batches(source, at=(epoch, 0)) for epoch in (0, 1))
    assert first != second
    assert {key for batch in first for key in batch} != {key for b in second for key in b}
    assert rank_batches(source, at=(1, 0)) == second


def test_seeds_differ(folder):
    manifest = read_manifest(str(folder / "a"))
    orders = [ShuffledOrder(manifest, BATCH, StreamOptions(seed=seed)) for seed in (3, 4)]
    assert rank_batches((manifest, orders[0])) != rank_batches((manifest, orders[1]))


def test_file_order_reads_everything_and_ranks_stay_even(folder):
    manifest = read_manifest(str(folder / "a"))
    order = FileOrder(manifest, 5)  # 23 micro-batches, the last of 2
    ranks = [rank_batches((manifest, order), rank, 2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [12, 12]
    assert ranks[1][-1] == ranks[0][0]  # the 24th repeats the first
    keys = [key for row in zip(*ranks, strict=True) for batch in row for key in batch]
    assert keys[:112] == sorted(keys[:112])
    assert len(set(keys[:112])) == 112


@pytest.mark.parametrize(
    ("samples", "batch", "per_step", "streams"),
    [
        (20, 2, 1, 2),  # 10 micro-batches; of the divisors of 48, 3 would lose one in ten
        (100_000, 4, 1, 48),
        (100_000, 4, 8, 48),
        (100_000, 4, 32, 64),
        (100_000, 4, 4096, 4096),
        (100_000, 4, 5, 50),
        (70, 2, 32, 32),
    ],
)
def test_streams_are_as_many_as_every_legal_number_of_ranks_can_share(
    samples, batch, per_step, streams
):
    order = ShuffledOrder(sizes([samples]), batch, StreamOptions(), per_step)
    assert order.streams == streams
    assert len(order) % per_step == 0
    assert len(order) * batch <= samples
    for world in range(1, per_step + 1):
        if per_step % world == 0:
            order.check_world(world)


def sizes(counts, name="x") -> Manifest:
    """Returns shards of which only the counts are known."""
    return Manifest([Shard(f"{name}{n}.tar", count) for n, count in enumerate(counts)], [])


@pytest.mark.parametrize(
    ("streams", "per_step", "world", "message"),
    [
        (12, 12, 5, "12 micro-batches.* by 5 ranks; use 1, 2, 3, 4, 6, 12 ranks"),
        (9, 8, 4, "9 virtual streams.*multiple of 4, or use 1 ranks"),
        (57, 1, 1, "56 or less"),
        (40, 1, 1, ""),
        (None, 57, 1, "112 samples are fewer than the 114"),
        (50, 51, 1, "multiple of 51"),
    ],
)
def test_what_cannot_be_shared_is_refused(streams, per_step, world, message):
    def check():
        options = StreamOptions(virtual_streams=streams)
        ShuffledOrder(sizes([112]), 2, options, per_step).check_world(world)

    if not message:
        return check()
    with pytest.raises(ValueError, match=message) as caught:
        check()
    assert "\n" not in str(caught.value)
    return None


# --- mixtures ------------------------------------------------------------------------------------


def rows(order, epochs: int) -> list:
    orders = [order.epoch(number) for number in range(epochs)]
    return [row for epoch in orders for m in range(len(epoch)) for row in epoch.rows(m)]


def make_mixture(weights) -> tuple:
    sets = [sizes([23, 1, 40, 17, 31], "a"), sizes([11, 20], "b")]
    parts = [Part(name, None, weight) for name, weight in zip("ab", weights, strict=True)]
    return mix(parts, sets, OPTIONS, BATCH, PER_STEP), sets


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.3, 0.7), (None, None)])
def test_every_set_of_a_mixture_goes_through_epochs_of_its_own(weights):
    order, sets = make_mixture(weights)
    assert len(order) == (112 + 31) // BATCH // PER_STEP * PER_STEP
    seen = rows(order, 10)
    for part, shards in enumerate([range(5), range(5, 7)]):
        own = [row.order.locate(row.stream, row.row) for row in seen if row.order.part == part]
        length = len(ShuffledOrder(sets[part], 1, StreamOptions()))
        assert 0 <= 20 * (len(sets[part]) - length) <= len(sets[part])
        epochs = [own[first : first + length] for first in range(0, len(own), length)]
        assert len(epochs) > 3
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert {shard for shard, _ in own} == set(shards)


def test_a_mixture_holds_its_weights():
    """The mixture is exact in each period, and near the weights at every row. Nothing drifts."""
    order, _ = make_mixture((0.7, 0.3))
    second = np.array([row.order.part for row in rows(order, 84)])
    before = np.cumsum(second)
    assert before[9999] == 3000
    assert np.abs(before - 0.3 * np.arange(1, len(before) + 1)).max() < 150
    by_size, _ = make_mixture((None, None))
    assert np.mean([row.order.part for row in rows(by_size, 10)]) == pytest.approx(
        31 / 143, abs=0.02
    )


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ([2.0, 1.0], [6666, 3333]),
        ([0.7, 0.3], [7000, 3000]),
        ([1, 1, 1], [3333, 3333, 3333]),
        ([10**9, 10**9 + 1], [5000, 5000]),
        ([10**9, 1], [9999, 1]),
        ([5.0], [10_000]),
    ],
)
def test_quotas(weights, quotas):
    assert count_quotas(weights) == quotas


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({}, "empty mapping"),
        ({"a": "x.tar"}, r"data\.train\.a: give it `shards`"),
        ({"a": {"shards": "x", "wieght": 1}}, r"data\.train\.a: give it `shards`"),
        ({"a": {"shards": "x", "weight": 0}}, r"data\.train\.a\.weight is 0"),
        ({"a": {"shards": "x", "weight": 1}, "b": {"shards": "y"}}, "b has no weight"),
    ],
)
def test_a_mixture_that_cannot_be_is_named(train, message):
    with pytest.raises(ValueError, match=message):
        read_parts(train)


# --- fingerprints and counts ---------------------------------------------------------------------


def test_a_fingerprint_survives_a_move_and_no_change(folder, tmp_path):
    here = read_manifest(str(folder / "a")).fingerprint()
    assert (
        read_manifest([str(p) for p in sorted((folder / "a").glob("*.tar"))]).fingerprint() == here
    )
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in sorted((folder / "a").glob("*.tar")):
        (moved / path.name).write_bytes(path.read_bytes())
    assert read_manifest(str(moved)).fingerprint() == here

    seen = {here}
    shard, index = moved / "a1.tar", index_path(moved / "a1.tar")
    index.unlink()
    with tarfile.open(shard, "w") as tar:  # equally many samples, another length
        info = tarfile.TarInfo("a1-0000.json")
        info.size = 600
        tar.addfile(info, io.BytesIO(bytes(600)))
    seen.add(read_manifest(str(moved)).fingerprint())
    index.unlink()
    write_tar(shard, 2)
    seen.add(read_manifest(str(moved)).fingerprint())
    shard.rename(moved / "a9.tar")
    seen.add(read_manifest(str(moved)).fingerprint())
    (moved / "a9.tar").unlink()
    seen.add(read_manifest(str(moved)).fingerprint())
    assert len(seen) == 5


def test_counts_of_a_prepared_folder_are_taken_without_its_indexes(tmp_path):
    """Counts as `energon prepare` leaves them are used until the folder changes."""
    paths = [write_tar(tmp_path / f"{n}.tar", count) for n, count in enumerate([4, 7])]
    (tmp_path / ".nv-meta").mkdir()
    info = tmp_path / ".nv-meta" / ".info.json"
    info.write_text(json.dumps({"shard_counts": {"0.tar": 4, "1.tar": 7}}))
    manifest = read_manifest(str(tmp_path))
    assert [shard.count for shard in manifest.shards] == [4, 7]
    assert not list(tmp_path.glob("*.idx"))

    reader = ShardReader(manifest, 30.0)  # makes an index where one is needed
    assert reader.read(1, 6)[:11] == b"1-0006.json"
    reader.close()
    assert [path.name for path in tmp_path.glob("*.idx")] == ["1.tar.idx"]

    write_tar(paths[0], 5)  # written in place, so the time of the folder stays
    os.utime(tmp_path, ns=(0, 0))
    assert [shard.count for shard in read_manifest(str(tmp_path)).shards] == [4, 7]
    reader = ShardReader(manifest, 30.0)
    with pytest.raises(BadSampleError, match=r"index_stale: 5 samples, but 4 when"):
        reader.read(0, 0)
    reader.close()
    os.utime(tmp_path)
    assert [shard.count for shard in read_manifest(str(tmp_path)).shards] == [5, 7]
    assert read_manifest(str(tmp_path)).fingerprint() != manifest.fingerprint()


def test_counts_of_many_shards_are_kept(tmp_path):
    data = write_tar(tmp_path / "x", 1).read_bytes()
    (tmp_path / "x").unlink()
    for n in range(1000):
        (tmp_path / f"{n:04d}.tar").write_bytes(data)
    first = read_manifest(str(tmp_path))
    info = json.loads((tmp_path / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {f"{n:04d}.tar": 1 for n in range(1000)}
    for index in tmp_path.glob("*.idx"):
        index.unlink()
    os.utime(tmp_path, ns=(0, 0))
    assert read_manifest(str(tmp_path / "{0000..0999}.tar")) == first
    assert not list(tmp_path.glob("*.idx"))


FIND_A_PLACE = """
import json, re, sys, time
from pathlib import Path
from datamodules.stream.index import read_manifest
from datamodules.stream.order import ShuffledOrder, StreamOptions
began = time.process_time()  # what it takes, however busy the machine is
manifest = read_manifest(sys.argv[1])
order = ShuffledOrder(manifest, 4, StreamOptions(), per_step=4096)
order.check_world(4096)
m = 4095 + 4096 * (len(order) // 4096 * 9 // 10)
places = [row.order.locate(row.stream, row.row) for row in order.epoch(7).rows(m)]
print(json.dumps({
    "seconds": time.process_time() - began,
    # not ru_maxrss, which begins with what the process had that started this one
    "bytes": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]),
    "places": places, "samples": len(manifest), "left_out": len(manifest) - 4 * len(order),
}))
"""


@pytest.mark.slow
def test_a_place_among_a_billion_samples_is_found_fast(tmp_path):
    """A million shards, 4,096 ranks: what a reader does before its first sample."""
    (tmp_path / ".nv-meta").mkdir()
    counts = {f"shard-{n:07d}.tar": 1000 for n in range(1_000_000)}
    (tmp_path / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": counts}))
    program = [sys.executable, "-c", FIND_A_PLACE, str(tmp_path / "shard-{0000000..0999999}.tar")]
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 10**9
    assert 0 <= found["left_out"] < 4 * 4096
    assert all(0 <= shard < 10**6 and 0 <= n < 1000 for shard, n in found["places"])
    assert len({tuple(place) for place in found["places"]}) == 4
    assert found["seconds"] < 10
    assert found["bytes"] < 10**9
