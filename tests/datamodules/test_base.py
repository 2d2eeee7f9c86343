"""A datamodule of another project: what it must provide, and that every callback works with it."""

import json

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from datamodules.base import VideoDataModule, datamodule_of
from datamodules.sample.outline import Outline
from datamodules.sample.tokenizer import tiny_tokenizer
from experiments.run.compose import build, build_all, plain, share_steps
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.uneven import make_rows


class Mine(VideoDataModule):
    """A datamodule that knows only the abstract class."""

    tokenizer = tiny_tokenizer()

    def _loader(self, batches):
        numbers = [[2 * n, 2 * n + 1] for n in range(batches)]
        return DataLoader(numbers, batch_size=None, collate_fn=make_rows)

    def train_dataloader(self):
        return self._loader(8)

    def val_dataloader(self):
        return self._loader(2)


@pytest.fixture
def trained(compose, tiny, tmp_path):
    """A run of four steps of two micro-batches, with all callbacks of ropelab-train."""
    words = [
        "pooler=prompt_guided_2x2",
        "logger=csv",
        "trainer.max_epochs=1",
        "scores=[perplexity]",
    ]
    config = compose([*tiny, *words], tmp_path)
    torch.manual_seed(0)
    scores = build(config.scores, "scores")
    optimizer = build(config.optim.optimizer, "optim")
    module = VideoLLMModule(plain(config.model), optimizer, scores=scores)
    data = Mine(2, global_batch_size=4, audit=True)
    callbacks = build_all(config.callbacks, "callbacks")
    loggers = build_all(config.logger, "logger")
    trainer = build(config.trainer, "trainer", callbacks=callbacks, logger=loggers)
    share_steps(trainer, data)
    trainer.fit(module, datamodule=data)
    return trainer, data, tmp_path


def test_every_callback_works_with_it(trained):
    trainer, data, folder = trained
    assert (trainer.global_step, data.trained_samples) == (4, 16)
    steps = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[1]["keys"] == ["s.tar/4", "s.tar/5", "s.tar/6", "s.tar/7"]
    generated = (folder / "generations.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in generated} == {4}
    scores = json.loads((folder / "scores.json").read_text())
    assert scores[-1]["data"] == "data Mine"
    assert json.loads((folder / "status.json").read_text())["step"] == 4
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_what_it_does_not_give_is_said_in_one_line():
    data = Mine(2)
    with pytest.raises(ValueError, match="Mine has no needle test: choose data=vniah"):
        _ = data.bank
    with pytest.raises(ValueError, match="needs the method `outlined`, which Mine does not have"):
        data.outlined(Outline([], words=1, learnt=1))
    assert (data.global_batch_size, data.per_step, data.accumulation(1)) == (2, 1, 1)
    with pytest.raises(ValueError, match=r"legal batch sizes for 1 rank: 1, 2, 4"):
        Mine(3, global_batch_size=4)


def test_other_datamodules_are_refused():
    trainer = Trainer(logger=False, accelerator="cpu")
    trainer.datamodule = LightningDataModule()
    with pytest.raises(ValueError, match="LightningDataModule is not a VideoDataModule"):
        datamodule_of(trainer)
