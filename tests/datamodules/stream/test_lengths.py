"""Measured lengths: equal to those in batches, stored beside the index, required by budgets."""

import json

import numpy as np
import pytest

from datamodules.batch import VISUAL_SLOT
from datamodules.instruct import InstructDataModule
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import make_sample, write_shards
from datamodules.stream.index import index_path, info_path, lengths_path, read_counts, read_manifest
from datamodules.stream.lengths import read_lengths, read_tokens
from datamodules.stream.order import StreamOptions
from datamodules.visuals.frames import FpsSampler, FrameReader, UniformSampler
from experiments.shards import main as shards


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
    """A pooler leaves 4 tokens of a frame. Samples have videos, pairs of images, or only text."""
    module = data(measured)
    manifest = read_manifest(str(measured))
    tokens = read_tokens(manifest, UniformSampler(4), module._options)
    known = {f"{n:09d}": length for n, length in enumerate(tokens.tolist())}
    seen = 0
    for batch in module.train_dataloader():
        slots = (batch.input_ids == VISUAL_SLOT).sum(1)
        counts, at = [shape[0] for shape in batch.shapes], 0
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
    assert "lengths of 4 samples, but the shard has 9" in refused()
    place.write_bytes(b"no numbers")
    assert "cannot be read" in refused()
    place.unlink()
    assert "has none" in refused()
    write_shards(measured, [9])
    assert not place.exists()


def test_lengths_lie_where_the_index_can(tmp_path):
    """If a folder cannot be written, the cache has both."""
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
    """They are ignored if the folder is newer. Then every index is opened."""
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
    """Other tokens make other batches, so a checkpoint of these is refused."""
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
    line = (
        f"of 20 samples are longer than data.stream.max_tokens={longest - 1}, "
        f"the longest has {longest} tokens:"
    )
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
