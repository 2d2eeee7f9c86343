"""From shards to batches: shapes, alignment, bad samples, and where the trainer stands."""

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf
from torch.multiprocessing.spawn import ProcessRaisedException

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, BadSampleError, VideoBatch
from datamodules.conversation import ConversationEncoder
from datamodules.frames import FrameReader, UniformSampler
from datamodules.index import index_path
from datamodules.instruct import InstructDataModule, decode_sample
from datamodules.order import StreamOptions
from datamodules.pack import write_shard
from datamodules.stream import Faults
from datamodules.synthetic import make_sample, write_shards
from experiments import CONFIG_DIR
from lightning_modules.callbacks import BadSamples


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
    """Learns nothing, and notes what it was given; `stop_at` is an optimizer step to fail in."""

    def __init__(self, save_at: int = 0, stop_at: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, int, str]] = []  # step, epoch, key
        self.save_at, self.stop_at, self.saved_at = save_at, stop_at, 0

    def training_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.stop_at:
            raise RuntimeError("stopped")
        self.trained += [(self.global_step, self.current_epoch, key[-12:]) for key in batch.keys]
        return self.weight * batch.frames.float().sum()

    def on_train_batch_end(self, *arguments) -> None:  # where checkpoints are saved
        if self.global_step == self.save_at != self.saved_at:
            self.saved_at = self.save_at  # not again while gradients of the next step add up
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/cut.ckpt")

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        assert len(batch) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # asks for the loader early
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAtTheEnd(Callback):
    """At the ends of epochs, or where a training fails."""

    def __init__(self, epoch: int | None = None):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/cut.ckpt")

    def on_exception(self, trainer, pl_module, exception) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/cut.ckpt")


class LateStrategy(SingleDeviceStrategy):
    """Restores the datamodule after the loaders were asked for, as `ModelParallelStrategy` does."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def fit(
    module, recorder, tmp_path, *callbacks, strategy="auto", resume=False, steps=13, ranks=1
) -> Recorder:
    """13 optimizer steps of two micro-batches are two epochs of five and a part of the third."""
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        strategy=strategy,
        devices=ranks,
        accumulate_grad_batches=module.accumulation(ranks),
        val_check_interval=4,
        logger=False,
        callbacks=[BadSamples(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
    )
    checkpoint = tmp_path / "cut.ckpt" if resume else None
    trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint, weights_only=True)
    return recorder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Twenty samples that are quick to decode."""
    folder = tmp_path_factory.mktemp("texts")
    for shard, numbers in enumerate((range(9), range(9, 13), range(13, 20))):
        samples = [(f"{n:09d}", make_sample(4 * n + 3)) for n in numbers]
        write_shard(folder / f"{shard}.tar", samples)
    return folder


@pytest.fixture(params=["set", "mixture"])
def make_data(request, texts):
    """Ten micro-batches an epoch, two a step."""
    parts = {"a": {"shards": f"{texts}/{{0,1}}.tar"}, "b": {"shards": f"{texts}/2.tar"}}
    train = {"set": str(texts), "mixture": parts}[request.param]
    return lambda: data(train, str(texts), global_batch_size=4, window=4, chunk=2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("cut", ["inside", "epoch", "exception", "late"])
def test_a_trainer_restarted_anywhere_goes_on_where_it_was(make_data, cut, tmp_path):
    """The place comes from the trainer's own counters, at the first batch and not before."""
    whole = fit(make_data(), Recorder(), tmp_path)
    epochs = [[key for _, epoch, key in whole.trained if epoch == n] for n in range(3)]
    assert [len(keys) for keys in epochs] == [20, 20, 12]
    assert epochs[0] != epochs[1]
    if cut == "exception":
        with pytest.raises(RuntimeError, match="stopped"):
            fit(make_data(), Recorder(stop_at=7), tmp_path, SaveAtTheEnd())
    else:
        end = SaveAtTheEnd(epoch=0 if cut == "epoch" else None)
        fit(make_data(), Recorder(save_at=7 if cut in ("inside", "late") else 0), tmp_path, end)
    step = 5 if cut == "epoch" else 7
    strategy = LateStrategy(torch.device("cpu")) if cut == "late" else "auto"
    rest = fit(make_data(), Recorder(), tmp_path, strategy=strategy, resume=True)
    assert rest.trained == [row for row in whole.trained if row[0] >= step]
    assert len(rest.trained) == (13 - step) * 4


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_checkpoint_of_another_stream_is_refused(texts, tmp_path):
    def same(train=str(texts), **options):
        return data(train, str(texts), **{"global_batch_size": 4, **options})

    fit(same(), Recorder(save_at=7), tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(texts, copy)
    fit(same(str(copy)), Recorder(), tmp_path, resume=True)  # moved, not changed

    changed = [(f"{n}", {**make_sample(4 * n + 3), "txt": b""}) for n in range(4)]
    write_shard(copy / "1.tar", changed)
    for changed, words in (
        (same(str(copy)), ["shards"]),
        (same(seed=2), ["settings", "seed 1 ", "seed 2 "]),
        (same(batch_size=1), ["settings", "batch 2 step 2", "batch 1 step 4"]),
    ):
        with pytest.raises(ValueError, match="changed since the checkpoint") as caught:
            fit(changed, Recorder(), tmp_path, resume=True)
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in [*words, "data.stream.on_changed=go_on"])
    rest = fit(same(seed=2, on_changed="go_on"), Recorder(), tmp_path, resume=True)
    assert [step for step, _, _ in rest.trained] == [s for s in range(7, 13) for _ in range(4)]

    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert saved["InstructDataModule"]["micro_batches"] == 4  # of the second epoch
    saved["InstructDataModule"]["micro_batches"] = 8  # as two ranks would have left it
    torch.save(saved, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match="at micro-batch 14 of all ranks, its checkpoint at 18"):
        fit(same(), Recorder(), tmp_path, resume=True)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_bad_samples_are_counted_once_however_often_a_run_is_resumed(spoilt, folder, tmp_path):
    def spoilt_data(**options):
        return data(str(spoilt), str(folder), global_batch_size=4, **options)

    module = spoilt_data()
    fit(module, Recorder(save_at=7), tmp_path)
    whole = module.faults["train"].counts
    assert whole.total() == 3 + 3 + len({4, 10, 15} & _third_epoch(module))
    resumed = spoilt_data()
    fit(resumed, Recorder(), tmp_path, resume=True)
    assert resumed.faults["train"].counts == whole


def _third_epoch(module) -> set[int]:
    """Samples of the first six micro-batches of the third epoch, bad ones too."""
    order = module._train_order().epoch(2)
    rows = [row for m in range(6) for row in order.rows(m)]
    places = [row.order.locate(row.stream, row.row) for row in rows]
    return {[0, 9, 13][shard] + sample for shard, sample in places}


class Tally(Callback):
    """Writes down what each rank knows after each step that does not stop it."""

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        known = [trainer.global_step, dict(trainer.datamodule.faults["train"].counts)]
        folder = Path(trainer.default_root_dir)
        (folder / f"{trainer.global_rank}-{trainer.world_size}").write_text(json.dumps(known))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_ranks_stop_together_where_too_much_is_bad(texts, tmp_path):
    """At the same step and with the same counts as one rank alone, and none of them hangs."""
    samples = [(f"{n:09d}", make_sample(4 * n + 3)) for n in range(260)]
    for n in range(0, 260, 13):
        samples[n][1]["json"] = b"{" if n % 2 else b"{}"
    write_shard(tmp_path / "a.tar", samples)
    fork = DDPStrategy(start_method="fork", process_group_backend="gloo")
    for ranks, strategy in ((1, "auto"), (2, fork)):
        module = data(str(tmp_path), str(texts), batch_size=4, global_batch_size=8)
        ends = (BadSampleError, ProcessRaisedException)
        with pytest.raises(ends, match=r"too_many_bad: 1\d of 2\d\d samples \(.*missing_field"):
            fit(module, Recorder(), tmp_path, Tally(), strategy=strategy, steps=99, ranks=ranks)
    known = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("?-?")}
    assert known.keys() == {"0-1", "0-2", "1-2"}
    assert known["0-2"] == known["1-2"] == known["0-1"]
    assert known["0-1"][0] >= 24
    assert known["0-1"][1].keys() == {"missing_field", "bad_json"}


def test_too_many_bad_samples_stop_a_training_with_the_commonest_reasons():
    faults = Faults("skip", max_rate=0.05)
    for reason, count in {"a": 3, "b": 5, "c": 1, "d": 2}.items():
        for _ in range(count):
            faults.add(BadSampleError(reason))
    faults.judge(199)
    faults.judge(220)
    with pytest.raises(BadSampleError, match=r"11 of 219 samples \(b 5, a 3, d 2\).*max_bad_rate"):
        faults.judge(219)
    faults.merge([{"b": 1}])  # what was new is part of what all ranks bring
    assert faults.counts == {"b": 1}
    with pytest.raises(BadSampleError, match="11 of 200 shards"):
        faults.add_shards([BadSampleError("tar_empty")] * 11, 200)


@pytest.mark.parametrize(
    ("sizes", "world", "message"),
    [
        ({"batch_size": 8, "global_batch_size": 12}, 1, "12 is no multiple of 8 x 1; legal batch "
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
