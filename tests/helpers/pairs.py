"""Writes pairs of answers, trains on them in seconds, and reads the results."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import torch

from datamodules.shards.synthetic import make_pair, write_shards
from datamodules.stream.index import Shard
from datamodules.stream.reading.tar import untar_sample
from experiments import CONFIG_DIR, train
from experiments.run.compose import build, plain

OPTIONS = {
    group: sorted(path.stem for path in (CONFIG_DIR / "module" / group).glob("*.yaml"))
    for group in ("loss", "reference")
}

#: The recipe at a size that trains in seconds.
TINY = [
    "experiment=ppllava_dpo",
    "scale=tiny",
    "encoder=clip_tiny",
    "model.encoder.image_size=32",
    "model.encoder.config.vision={patch_size:8,hidden_size:32,num_attention_heads:2}",
    "model.encoder.config.vision.num_hidden_layers=2",
    "llm=tiny",
    "model.llm.config={hidden_size:64,intermediate_size:64,num_hidden_layers:2}",
    "model.llm.config.num_attention_heads=2",
    "model.llm.config.num_key_value_heads=2",
    "tuning=full",
    "prepare=null",
    "data.batch_size=2",
    "data.global_batch_size=4",
    "data.stream.num_workers=0",
    "data.stream.virtual_streams=2",
    "data.frames.sampler.num_frames=2",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
    "callbacks.generations=null",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "print_config=false",
    "logger=csv",
]


def write_pairs(folder):
    """Writes 16 pairs for training, in two shards, and 5 pairs for validation."""
    write_shards(folder / "train", [9, 7], num_frames=4, make=make_pair)
    write_shards(folder / "val", [5], seed=1000, num_frames=4, make=make_pair)
    return folder


def words_of(shards):
    """Returns overrides of a run on these shards."""
    return [*TINY, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]


def stage_maker(words, compose, folders):
    """Returns `make_stage(*overrides)`, which builds module and datamodule.

    The seed is that of a run, so the module gets the same initial weights.
    """

    def make(*overrides):
        config = compose([*words, *overrides], folders.mktemp("stage"))
        module = build(config.module, "module")(model=plain(config.model))
        torch.manual_seed(0)
        return module, build(config.data, "data")

    return make


def read_pairs(data, count, split="train"):
    data.prepare_data()
    shard = data.shards()[split][0]
    return [data.decoder()(raw) for raw in read_shard(Path(shard.url))[:count]]


def read_shard(path):
    data = path.read_bytes()
    bounds = pairwise(Shard(str(path), 0).read_offsets())
    return [untar_sample(data[start:end], str(path)) for start, end in bounds]


def run(folder, words, compose):
    config = compose(words, folder)
    train.main.__wrapped__(config)
    return json.loads((folder / "done.json").read_text())


def saved(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def val_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return [{k: float(v) for k, v in row.items() if k.startswith("val/")} for row in rows]
