"""Small runs: shards made here, the shipped configs at sizes that train in a second."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

import experiments.run  # noqa: F401 - registers the resolver of run names
from datamodules.pack import write_shard
from datamodules.synthetic import draw_frames, encode_image, encode_video
from experiments import CONFIG_DIR, train

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

#: The demo's recipe at a size that trains in a second: 12 steps.
TINY = [
    "experiment=vniah_d_tiny",
    "model.encoder.image_size=32",
    "model.encoder.config.vision.patch_size=8",
    "model.encoder.config.vision.hidden_size=32",
    "model.encoder.config.vision.num_attention_heads=2",
    "model.encoder.config.vision.num_hidden_layers=2",
    "model.llm.config.hidden_size=64",
    "model.llm.config.intermediate_size=64",
    "model.llm.config.num_hidden_layers=2",
    "model.llm.config.num_attention_heads=2",
    "model.llm.config.num_key_value_heads=2",
    "data.global_batch_size=4",
    "data.batch_size=4",
    "data.training.samples=48",
    "data.training.frames=[3,6]",
    "data.grid.frames=[4,9]",
    "data.grid.needles=6",
    "data.grid.depths=[0.0,0.5,1.0]",
    "data.grid.conditions.periodic.period=3",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
    "callbacks.summary=null",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
    "print_config=false",
]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_needle_shards(folder: Path) -> Path:
    """`vniah/` as the demo lays it out, of clips and cards that no other split shares."""
    (folder / "vniah").mkdir(parents=True)
    for offset, split in enumerate(("train", "test")):
        clips = [
            (f"clip{n}", {"mp4": encode_video(draw_frames(100 * offset + n, 12, 32)[0])})
            for n in range(2)
        ]
        write_shard(folder / "vniah" / f"haystack-{split}.tar", clips)
        cards = [make_needle(1000 * (offset + 1) + n) for n in range(24)]
        write_shard(folder / "vniah" / f"needles-{split}.tar", cards)
    return folder


def make_needle(seed: int) -> tuple[str, dict[str, bytes]]:
    (picture,), color, digit = draw_frames(seed, 1, 32)
    turns = [
        {"from": "human", "value": f"<image>\nWhich digit is on the {color} card?"},
        {"from": "gpt", "value": f"{color} {digit}"},
    ]
    entry = json.dumps({"conversations": turns}).encode()
    return f"{seed:06d}", {"jpg": encode_image(picture), "json": entry}


@pytest.fixture(scope="session")
def needle_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `paths.data` is set to."""
    return write_needle_shards(tmp_path_factory.mktemp("data"))


def compose(overrides: Sequence[str], folder: Path, config_name: str = "train") -> DictConfig:
    """The config of a program that runs in `folder`, as Hydra hands it over."""
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra.compose(config_name, list(overrides), return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.runtime.output_dir = str(folder)
    config.hydra.runtime.cwd = str(Path.cwd())
    config.hydra.mode = hydra.types.RunMode.RUN
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


@pytest.fixture(scope="session")
def tiny(needle_shards: Path) -> list[str]:
    """Overrides of a tiny run."""
    return [*TINY, f"paths.data={needle_shards}"]


@pytest.fixture(scope="session", name="compose")
def compose_fixture() -> Callable[..., DictConfig]:
    return compose


@pytest.fixture(scope="session")
def run_train(tiny: list[str]) -> Callable[..., float | None]:
    """`run_train(folder, *overrides)`: ropelab-train in this process, tiny, metrics.csv alone."""

    def run(folder: Path, *overrides: str) -> float | None:
        config = compose([*tiny, "logger=csv", *overrides], folder)
        return train.main.__wrapped__(config)

    return run
