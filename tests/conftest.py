"""Fixtures for small runs: synthetic shards, and shipped configs that train in a second."""

# ruff: noqa: E402 - replaces warnings.warn before imports, because libraries may keep a reference
from tests.helpers import deprecations

deprecations.blame_callers()

# isort: split
import json
import multiprocessing
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers.integrations.flex_attention import WrappedFlexAttention

import experiments.launcher  # noqa: F401 - registers the resolver of run names
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from experiments import CONFIG_DIR, train
from tests.helpers.quiet import QUIET

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

#: The demo's recipe at a size that trains in a second, 12 steps.
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
    *QUIET,
]


def pytest_configure(config: pytest.Config) -> None:
    for line in deprecations.filters():
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_needle_shards(folder: Path) -> Path:
    """Writes the demo's `vniah/` folder. The splits share no clips and no cards."""
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
    """The folder for `paths.data`, with needle shards."""
    return write_needle_shards(tmp_path_factory.mktemp("data"))


def compose(overrides: Sequence[str], folder: Path, config_name: str = "train") -> DictConfig:
    """Returns the config of a program that runs in `folder`, as Hydra passes it."""
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
    """Returns overrides of a tiny run."""
    return [*TINY, f"paths.data={needle_shards}"]


@pytest.fixture(scope="session", name="compose")
def compose_fixture() -> Callable[..., DictConfig]:
    return compose


@pytest.fixture(scope="session")
def run_train(tiny: list[str]) -> Callable[..., float | None]:
    """`run_train(folder, *overrides)` runs a tiny ropelab-train here, with only the CSV logger."""

    def run(folder: Path, *overrides: str) -> float | None:
        config = compose([*tiny, "logger=csv", *overrides], folder)
        return train.main.__wrapped__(config)

    return run


#: Timeout in seconds for ranks that wait for one another.
HANG = 240


def run_ranks(world: int, function: Callable[[int], Any]) -> list[Any]:
    """Runs `function(rank)` in `world` processes, as torchrun would, and returns their results.

    The processes are forked from the test, so that nothing is imported again.

    Raises:
        RuntimeError: a rank failed, hangs or died. The message has the tracebacks.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, function, pipes[rank][1]))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for _, writing in pipes:
        writing.close()  # closed in the parent, so that the death of a rank ends its pipe
    try:
        results = [_receive(process, pipe) for process, (pipe, _) in zip(ranks, pipes, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    failures = [text for failed, text in results if failed]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in results]


def _receive(process: Any, pipe: Connection) -> tuple[bool, Any]:
    try:
        return (
            pickle.loads(pipe.recv_bytes()) if pipe.poll(HANG) else (True, f"{process.name} hangs")
        )
    except EOFError:
        return True, f"{process.name} died"


def _rank(rank: int, world: int, port: int, function: Callable, pipe: Connection) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_RANK": "0",
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world)),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
    }
    rank_zero_only.rank = fabric_rank_zero_only.rank = rank
    try:
        outcome = (False, function(rank))
    except BaseException:  # any end of a rank is reported to the test
        outcome = (True, f"rank {rank}: {traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(outcome))  # tensors by value: this process ends here
    time.sleep(HANG)  # others may still read rank 0's store; the parent kills all ranks
    os._exit(0)  # skips the test runner's exit handlers


@pytest.fixture(scope="session", name="run_ranks")
def run_ranks_fixture() -> Callable[[int, Callable[[int], Any]], list[Any]]:
    return run_ranks


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """Runs flex_attention by PyTorch's eager reference, because compiling it takes a minute."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask")
        yield
