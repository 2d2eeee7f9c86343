"""From shards to batches: shapes, alignment, bad samples, and the contents of a step."""

import tarfile
from functools import partial

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch
from datamodules.errors import BadSampleError
from datamodules.instruct import decode_sample, described
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import make_sample, write_shards
from datamodules.stream.index import index_path
from datamodules.stream.loader import Faults
from datamodules.visuals.frames import FrameReader, UniformSampler
from datamodules.visuals.sizes import Pad
from experiments import CONFIG_DIR
from tests.helpers.tiny_shards import COUNTS, data, write_spoilt_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, COUNTS)
    return folder


@pytest.fixture
def spoilt(tmp_path):
    return write_spoilt_shards(tmp_path)


def flat(batch: VideoBatch) -> list:
    return [batch.keys, batch.input_ids.tolist(), batch.labels.tolist(), batch.pixels.tolist()]


def test_batches_hold_what_the_samples_hold(folder):
    """Every row and frame of a batch equals its sample when decoded by itself."""
    module = data(str(folder))
    read = partial(
        decode_sample, frames=FrameReader(32, UniformSampler(4)), conversation=module.conversation
    )
    alone = {f"{n:09d}": read({"__key__": "", "__url__": "", **make_sample(n)}) for n in range(20)}
    seen = []
    for batch in module.train_dataloader():
        frames = [visual.frames for visual in batch.visuals]
        for row, key in enumerate(batch.keys):
            sample = alone[key[-9:]]
            length = len(sample.text.input_ids)
            assert batch.input_ids[row, :length].tolist() == sample.text.input_ids
            assert batch.labels[row, :length].tolist() == sample.text.labels
            assert batch.attention_mask[row].tolist() == [
                n < length for n in range(batch.input_ids.shape[1])
            ]
            assert (batch.labels[row, length:] == IGNORE_INDEX).all()
            assert batch.prompt_ids[row][batch.prompt_mask[row]].tolist() == sample.text.prompt_ids
            for visual in sample.visuals:
                assert torch.equal(frames.pop(0), visual.frames)
        assert not frames
        assert batch.pixels.dtype == torch.uint8
        seen += batch.keys
    assert len(seen) == len(set(seen)) == 20
    assert all(key.startswith(str(folder)) for key in seen)


def test_text_alone_makes_a_batch_without_frames(folder, tmp_path):
    write_shard(tmp_path / "a.tar", [("t", make_sample(3))])
    (batch,) = data(str(tmp_path), batch_size=1).train_dataloader()
    assert batch.pixels.shape == (0,)
    assert VISUAL_SLOT not in batch.input_ids


def test_workers_change_nothing(folder):
    alone = [flat(batch) for batch in data(str(folder)).train_dataloader()]
    assert [flat(b) for b in data(str(folder), num_workers=2).train_dataloader()] == alone


def infos(batches):
    """Returns the facts about the visuals of each sample. Each batch has one sample."""
    return {batch.keys[0]: batch.infos for batch in batches}


def test_draws_belong_to_the_sample_the_epoch_and_the_seed(folder):
    """A draw does not depend on the worker or the stream position. Validation has no draws."""

    def drawn(seed=0, workers=0, epoch=0, batch_size=1):
        module = data(str(folder), batch_size=batch_size, num_workers=workers, seed=seed)
        loader = module.train_dataloader()
        loader._position = lambda: (epoch, 0)
        return {key: [i.draw for i in found] for key, found in infos(loader).items()}

    first = drawn()
    numbers = [number for row in first.values() for number in row]
    assert len(set(numbers)) == len(numbers) > 10
    assert all(0 <= number < 1 for number in numbers)
    assert min(numbers) < 0.3 < 0.7 < max(numbers)
    assert drawn(workers=2) == first
    assert all(drawn(epoch=1)[key] != row for key, row in first.items() if row)
    assert all(drawn(seed=1)[key] != row for key, row in first.items() if row)
    checked = data(None, str(folder), batch_size=1).val_dataloader()
    assert {i.draw for found in infos(checked).values() for i in found} == {None}


def test_videos_of_a_batch_have_their_times_and_images_have_none(folder):
    kinds = set()
    for batch in data(str(folder)).train_dataloader():
        for visual in batch.visuals:
            seconds = visual.info.seconds
            kinds.add(seconds is None)
            if seconds is not None:
                assert len(seconds) == len(visual.frames)
                assert sorted(seconds) == list(seconds)
                assert seconds[-1] > seconds[0] == 0
    assert kinds == {True, False}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_shown(spoilt, folder, workers, caplog):
    module = data(str(spoilt), num_workers=workers)
    keys = [key[-9:] for batch in module.train_dataloader() for key in batch.keys]
    clean = [key[-9:] for b in data(str(folder)).train_dataloader() for key in b.keys]
    moved = {a for a, b in zip(clean, keys, strict=True) if a != b}
    assert moved == {"000000004", "000000010", "000000015"}
    assert moved.isdisjoint(keys)
    counts = {"video_unreadable": 1, "bad_json": 1, "slot_mismatch": 1}
    assert module.faults["train"].counts == counts
    module.teardown("fit")
    assert "3 bad samples skipped" in caplog.text
    assert "video_unreadable 1" in caplog.text


def test_evaluation_raises_in_one_line(spoilt):
    module = data(None, str(spoilt))
    with pytest.raises(BadSampleError) as caught:
        list(module.val_dataloader())
    shard = spoilt / "shard-000000.tar"
    assert str(caught.value).startswith(f"{shard} [000000004]: video_unreadable: ")
    assert len(list(data(None, str(spoilt), on_bad_sample="skip").val_dataloader())) == 10
    with pytest.raises(BadSampleError):
        list(data(str(spoilt), on_bad_sample="raise").train_dataloader())


def test_a_broken_shard_is_counted_and_the_others_go_on(tmp_path):
    paths = write_shards(tmp_path, [9, 4, 7])
    index_path(paths[1]).unlink()
    paths[1].write_bytes(b"")
    module = data(str(tmp_path))
    assert sum(len(batch) for batch in module.train_dataloader()) == 16
    assert module.faults["train"].counts == {"tar_empty": 1}
    with pytest.raises(BadSampleError, match=r"shard-000001\.tar: tar_empty"):
        data(None, str(tmp_path)).val_dataloader()


def test_a_users_mistakes_are_one_line(tmp_path):
    for module, advice in (
        (data(str(tmp_path / "none-*.tar")), "no file matches"),
        (data(str(tmp_path / "none.tar")), "no sample in 1 shards.*shard_missing"),
        (data(None), "set data.train"),
    ):
        with pytest.raises(ValueError, match=advice) as caught:
            module.train_dataloader()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'skip' or 'raise'"):
        data(str(tmp_path), on_bad_sample="ignore")


def test_too_many_bad_samples_stop_a_training_with_the_commonest_reasons():
    faults = Faults("skip", max_rate=0.05)
    for reason, count in {"a": 3, "b": 5, "c": 1, "d": 2}.items():
        for _ in range(count):
            faults.add(BadSampleError(reason))
    faults.judge(199)
    faults.judge(220)
    with pytest.raises(BadSampleError, match=r"11 of 219 samples \(b 5, a 3, d 2\).*max_bad_rate"):
        faults.judge(219)
    faults.merge([{"b": 1}])  # the new faults are part of what all ranks report
    assert faults.counts == {"b": 1}
    with pytest.raises(BadSampleError, match="11 of 200 shards"):
        faults.add_shards([BadSampleError("tar_empty")] * 11, 200)


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"batch_size": 8, "global_batch_size": 12}, 1, "not a multiple of 8 x 1; legal batch "
         "sizes for 1 rank: 1, 2, 3, 4, 6, 12"),
        ({"batch_size": 6, "global_batch_size": 12}, 4, "legal batch sizes for 4 ranks: 1, 3"),
        ({"batch_size": 4, "global_batch_size": 32}, 3, "legal global batch sizes: multiples of "
         "12; legal numbers of ranks: 1, 2, 4, 8"),
        ({"batch_size": 4, "global_batch_size": 0}, 1, "legal global batch sizes: multiples of 4"),
    ],
)  # fmt: skip
def test_batches_that_do_not_divide_a_step_are_refused(sizes, world, message):
    with pytest.raises(ValueError, match=message) as caught:
        data("x.tar", **sizes).accumulation(world)
    assert f"data.global_batch_size={sizes['global_batch_size']} with" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_step_is_shared_by_accumulation():
    module = data("x.tar", batch_size=2, global_batch_size=12)
    assert [module.accumulation(world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]


def test_the_shipped_config_builds_it(folder):
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra.compose(overrides=["+data=instruct", "+llm=tiny", "+encoder=clip_tiny"])
    OmegaConf.set_struct(config, False)
    config.seed, config.data.train, config.data.stream.num_workers = 0, str(folder), 0
    config.data.global_batch_size = 4
    module = hydra.utils.instantiate(config.data)
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 4
    assert {shape[1:] for shape in batch.shapes} == {(3, 64, 64)}
    for name in ("input_ids", "prompt_ids"):
        assert int(getattr(batch, name).max()) < config.model.llm.config.vocab_size


def test_shards_are_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_shards(tmp_path / name, [5], seed=2)
    first, second = (tmp_path / name / "shard-000000.tar" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        names = tar.getnames()
    assert names[:2] == ["000000002.json", "000000002.mp4"]


def test_frames_are_described_by_what_is_set():
    """Scores of earlier runs have the first form, and are compared with those of today."""
    sampler = UniformSampler(4)
    plain = {"name": "FrameReader", "image_size": 32, "max_pixels": 33177600, "tiles": None}
    plain["sampler"] = {"name": "UniformSampler", "num_frames": 4}
    assert described(FrameReader(32, sampler)) == plain
    padded = described(FrameReader(32, sampler, policy=Pad(), filter="bicubic"))
    policy = {"name": "Pad", "color": (122, 116, 104)}
    assert padded == plain | {"policy": policy, "filter": "bicubic"}
