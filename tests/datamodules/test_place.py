"""The stream position of a trainer: resumed anywhere, refused elsewhere, equal on all ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.multiprocessing.spawn import ProcessRaisedException

from datamodules.batch import VideoBatch
from datamodules.errors import BadSampleError
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import make_sample, write_shards
from lightning_modules.callbacks.samples import BadSamples
from tests.helpers.tiny_shards import COUNTS, data, write_spoilt_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, COUNTS)
    return folder


@pytest.fixture
def spoilt(tmp_path):
    return write_spoilt_shards(tmp_path)


class Recorder(LightningModule):
    """Trains nothing, and records its batches. It fails in the optimizer step `stop_at`."""

    def __init__(self, save_at: int = 0, stop_at: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, int, str]] = []  # step, epoch, key
        self.save_at, self.stop_at, self.saved_at = save_at, stop_at, 0

    def training_step(self, batch: VideoBatch, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.stop_at:
            raise RuntimeError("stopped")
        self.trained += [(self.global_step, self.current_epoch, key[-12:]) for key in batch.keys]
        return self.weight * batch.pixels.float().sum()

    def on_train_batch_end(self, *arguments) -> None:  # where checkpoints are saved
        if self.global_step == self.save_at != self.saved_at:
            self.saved_at = self.save_at  # once: then gradients of the next step accumulate
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/cut.ckpt")

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        assert len(batch) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # asks for the loader early
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAtTheEnd(Callback):
    """Saves at the ends of epochs, or where a training fails."""

    def __init__(self, epoch: int | None = None):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/cut.ckpt")

    def on_exception(self, trainer, pl_module, exception) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/cut.ckpt")


class LateStrategy(SingleDeviceStrategy):
    """Restores the datamodule after the loaders were made, as `ModelParallelStrategy` does."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def fit(
    module, recorder, tmp_path, *callbacks, strategy="auto", resume=False, steps=13, ranks=1
) -> Recorder:
    """13 optimizer steps of two micro-batches: two epochs of five, and a part of the third."""
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
    """Twenty samples that decode fast."""
    folder = tmp_path_factory.mktemp("texts")
    for shard, numbers in enumerate((range(9), range(9, 13), range(13, 20))):
        samples = [(f"{n:09d}", make_sample(4 * n + 3)) for n in numbers]
        write_shard(folder / f"{shard}.tar", samples)
    return folder


@pytest.fixture(params=["set", "mixture"])
def make_data(request, texts):
    """Ten micro-batches per epoch, two per step."""
    parts = {"a": {"shards": f"{texts}/{{0,1}}.tar"}, "b": {"shards": f"{texts}/2.tar"}}
    train = {"set": str(texts), "mixture": parts}[request.param]
    return lambda: data(train, str(texts), global_batch_size=4, window=4, chunk=2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("cut", ["inside", "epoch", "exception", "late"])
def test_a_trainer_restarted_anywhere_goes_on_where_it_was(make_data, cut, tmp_path):
    """The stream position comes from the trainer's own counters, at the first batch."""
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
    fit(same(str(copy)), Recorder(), tmp_path, resume=True)  # moved, but not changed

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
    saved["InstructDataModule"]["micro_batches"] = 8  # as two ranks would have stored it
    torch.save(saved, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=r"at micro-batch 14 of all ranks, but .* is at 18"):
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
    """Returns the samples of the first six micro-batches of the third epoch, with bad ones."""
    order = module._train_order().epoch(2)
    rows = [row for m in range(6) for row in order.rows(m)]
    places = [row.order.locate(row.stream, row.row) for row in rows]
    return {[0, 9, 13][shard] + sample for shard, sample in places}


class Tally(Callback):
    """Records what each rank knows after each step that does not stop it."""

    def on_train_batch_end(self, trainer, pl_module, *arguments) -> None:
        known = [trainer.global_step, dict(trainer.datamodule.faults["train"].counts)]
        folder = Path(trainer.default_root_dir)
        (folder / f"{trainer.global_rank}-{trainer.world_size}").write_text(json.dumps(known))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_ranks_stop_together_where_too_much_is_bad(texts, tmp_path):
    """Ranks stop at the same step and with the same counts as a single process, and none hangs."""
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
