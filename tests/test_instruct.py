"""From shards to batches: shapes, alignment, bad samples, and where the trainer stands."""

import json
import tarfile
from functools import partial

import hydra
import pytest
import torch
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, BadSampleError, VideoBatch
from datamodules.conversation import ConversationEncoder
from datamodules.frames import FrameReader, UniformSampler
from datamodules.index import index_path
from datamodules.instruct import InstructDataModule, decode_sample
from datamodules.order import StreamOptions
from datamodules.pack import write_shard
from datamodules.synthetic import make_sample, write_shards
from experiments import CONFIG_DIR


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, [9, 4, 7])
    return folder


def data(train, val=None, **options) -> InstructDataModule:
    """Options of the stream, and beside them sizes."""
    names = ("batch_size", "global_batch_size")
    settings = {"batch_size": 2} | {name: options.pop(name) for name in names if name in options}
    settings["stream"] = StreamOptions(**{"seed": 1, **options})
    frames = FrameReader(32, UniformSampler(4))
    return InstructDataModule(train, val, frames, ConversationEncoder, **settings)


def flat(batch: VideoBatch) -> list:
    return [batch.keys, batch.input_ids.tolist(), batch.labels.tolist(), batch.frames.tolist()]


def test_batches_hold_what_the_samples_hold(folder):
    """Every row and frame of a batch equals its sample decoded alone."""
    module = data(str(folder))
    read = partial(
        decode_sample, frames=FrameReader(32, UniformSampler(4)), conversation=module.conversation
    )
    alone = {f"{n:09d}": read({"__key__": "", "__url__": "", **make_sample(n)}) for n in range(20)}
    seen = []
    for batch in module.train_dataloader():
        frames = list(batch.frames.split(batch.frame_counts))
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
                assert torch.equal(frames.pop(0), visual)
        assert not frames
        assert batch.frames.dtype == torch.uint8
        seen += batch.keys
    assert len(seen) == len(set(seen)) == 20
    assert all(key.startswith(str(folder)) for key in seen)


def test_text_alone_makes_a_batch_without_frames(folder, tmp_path):
    write_shard(tmp_path / "a.tar", [("t", make_sample(3))])
    (batch,) = data(str(tmp_path), batch_size=1).train_dataloader()
    assert batch.frames.shape == (0, 3, 32, 32)
    assert VISUAL_SLOT not in batch.input_ids


def test_workers_change_nothing(folder):
    alone = [flat(batch) for batch in data(str(folder)).train_dataloader()]
    assert [flat(b) for b in data(str(folder), num_workers=2).train_dataloader()] == alone


def spoil(folder, *, shard: int, sample: int, members: dict[str, bytes]):
    """Writes one of the shards again with members of one sample changed."""
    first = [0, 9, 13][shard]
    samples = [(f"{n:09d}", make_sample(n)) for n in range(first, first + [9, 4, 7][shard])]
    samples[sample][1].update(members)
    write_shard(folder / f"shard-{shard:06d}.tar", samples)


@pytest.fixture
def spoilt(tmp_path):
    write_shards(tmp_path, [9, 4, 7])
    spoil(tmp_path, shard=0, sample=4, members={"mp4": b"\0" * 99})
    spoil(tmp_path, shard=1, sample=1, members={"json": b"{"})
    two_slots = json.loads(make_sample(15)["json"])
    two_slots["conversations"][0]["value"] = "<image><image>"
    spoil(tmp_path, shard=2, sample=2, members={"json": json.dumps(two_slots).encode()})
    return tmp_path


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


class Recorder(LightningModule):
    """Learns nothing, and notes what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, str]] = []

    def training_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        self.trained += [(self.current_epoch, key) for key in batch.keys]
        return self.weight * batch.frames.float().sum()

    def on_train_batch_end(self, *arguments) -> None:  # where ModelCheckpoint saves
        if self.global_step == 13:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/13.ckpt")

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        assert len(batch) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder, *, steps: int, tmp_path, checkpoint=None) -> Recorder:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data(str(folder), str(folder)), ckpt_path=checkpoint)
    return recorder


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own call
def test_a_trainer_restarted_inside_an_epoch_goes_on_where_it_was(folder, tmp_path):
    """The place comes from the trainer's own counters; each epoch has its own order."""
    whole = fit(folder, steps=25, tmp_path=tmp_path)  # 10 batches an epoch
    epochs = [[key for epoch, key in whole.trained if epoch == n] for n in range(3)]
    assert [len(keys) for keys in epochs] == [20, 20, 10]
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    rest = fit(folder, steps=25, tmp_path=tmp_path, checkpoint=tmp_path / "13.ckpt")
    assert rest.trained == whole.trained[26:]


def test_the_shipped_config_builds_it(folder):
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra.compose(overrides=["+data=instruct", "+llm=tiny", "+encoder=clip_tiny"])
    OmegaConf.set_struct(config, False)
    config.seed, config.data.train, config.data.stream.num_workers = 0, str(folder), 0
    config.data.global_batch_size = 4
    module = hydra.utils.instantiate(config.data)
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 4
    assert batch.frames.shape[1:] == (3, 64, 64)
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
