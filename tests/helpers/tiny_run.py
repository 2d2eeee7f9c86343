"""A training of one second, for tests that stop, kill and resume it.

It orders batches as the real streams do. Batch m of an epoch is the same for every number of ranks,
rank r takes m = r, r + world, ..., and the trainer gives the stream position.
"""

import csv
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datamodules.stream.loader import outlive_stop_signals
from lightning_modules.checkpoint import BestCheckpoint, LastCheckpoint, newest_whole
from lightning_modules.checkpoint.preemption import Preempted, signals
from lightning_modules.loggers.csv import ResumableCSVLogger

BATCHES = 24  # micro-batches per epoch, over all ranks


def numbers(*seed: int) -> Tensor:
    mixed = sum(part * 1000**place for place, part in enumerate(seed))
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(mixed))


class Numbers(Dataset):
    def __init__(self, split: int, epoch: int):
        self.split, self.epoch = split, epoch

    def __getitem__(self, m: int) -> tuple[int, Tensor]:
        return m, numbers(self.split, self.epoch, m)


class Batches:
    """A loader with a length that Lightning can resume."""

    def __init__(self, trainer: Trainer, split: int, count: int, workers: int):
        self.trainer, self.split, self.count, self.workers = trainer, split, count, workers

    def __len__(self) -> int:
        return self.count // self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        epoch, done, world = 0, 0, self.trainer.world_size
        if self.split == 0:
            epoch = self.trainer.current_epoch
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed * world
        mine = range(done + self.trainer.global_rank, self.count, world)
        yield from DataLoader(
            Numbers(self.split, epoch),
            sampler=mine,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=outlive_stop_signals,
        )


class Data(LightningDataModule):
    def __init__(self, workers: int = 0):
        super().__init__()
        self.workers = workers

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer, 0, BATCHES, self.workers)

    def val_dataloader(self) -> Batches:
        return Batches(self.trainer, 1, 4, 0)


class Tiny(LightningModule):
    """A tiny module that appends each training micro-batch to `seen-<rank>.jsonl`.

    Args:
        folder: folder for these files.
        ballast: megabytes to add to the checkpoint.
        at_batch: called before each training batch with the module and the number of steps done.
    """

    def __init__(self, folder: Path, ballast: float = 0, at_batch: Callable | None = None):
        super().__init__()
        self.folder, self.at_batch = folder, at_batch
        self.ballast = ballast
        self.layers: nn.Sequential | None = None

    def configure_model(self) -> None:
        if self.layers is None:
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
            self.register_buffer("weight", torch.zeros(int(self.ballast * 250_000)))
            if self.device_mesh is not None:
                from torch.distributed.fsdp import fully_shard

                mesh = self.device_mesh["data_parallel"]
                for layer in self.layers:
                    fully_shard(layer, mesh=mesh) if list(layer.parameters()) else None
                fully_shard(self.layers, mesh=mesh)

    def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> Tensor:
        m, x = batch
        with (self.folder / f"seen-{self.global_rank}.jsonl").open("a") as file:
            step, epoch = self.trainer.global_step, self.trainer.current_epoch
            file.write(json.dumps([step, epoch, m]) + "\n")
        if self.at_batch:
            self.at_batch(self, self.trainer.global_step)
        loss = (self.layers(x) - x.sum(1, keepdim=True)).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[int, Tensor], batch_idx: int) -> None:
        _, x = batch
        loss = (self.layers(x) - x.sum(1, keepdim=True)).square().mean()
        self.log("val/loss", loss, sync_dist=True, batch_size=2)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(
    folder: Path,
    *more: Callback,
    module: Tiny | None = None,
    last: dict[str, Any] | None = None,
    workers: int = 0,
    **options: Any,
) -> Trainer:
    """Trains, starting from the newest complete checkpoint in `folder` if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    last = {"every_n_steps": 4} | (last or {})
    defaults = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
    trainer = Trainer(
        **defaults | options,
        callbacks=[LastCheckpoint(checkpoints, **last), BestCheckpoint(checkpoints), *more],
        logger=ResumableCSVLogger(folder),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    resumed = newest_whole(checkpoints)
    data = Data(workers)
    trainer.fit(module or Tiny(folder), datamodule=data, ckpt_path=resumed, weights_only=True)
    return trainer


@dataclass
class Ranks:
    """Processes that train in `folder`, forked from a process that has imported everything.

    Their exit codes are those of the programs: 0, 75 if preempted, 130 if interrupted, and 1 for an
    error in one line, which `said` returns.

    Args:
        slow: extra seconds per batch.
        file_limit: most bytes that a process may write to one file.
    """

    folder: Path
    world: int = 1
    sharded: bool = False
    every: int = 4
    ballast: float = 0
    slow: float = 0
    file_limit: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "processes"}

    def start(self) -> "Ranks":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = len(read_seen(self.folder))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tiny_run"])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # of the fork server
        self.processes = [
            context.Process(
                target=self.run, args=(rank, port), daemon=not self.options.get("workers")
            )
            for rank in range(self.world)
        ]
        for process in self.processes:
            process.start()
        return self

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Returns the exit codes. Kills processes at the timeout; these have None."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid or 0, number)

    def wait_for_step(self, step: int) -> None:
        """Waits until these ranks have begun the optimizer step `step`, counted from 0."""
        end = time.monotonic() + 60
        while len(seen := read_seen(self.folder)) == self.before or seen[-1][0] < step:
            assert time.monotonic() < end, self.said()
            assert any(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.002)

    def said(self, rank: int = 0) -> str:
        path = self.folder / f"said-{rank}.txt"
        return path.read_text() if path.is_file() else ""

    def run(self, rank: int, port: int) -> None:
        os.setpgid(0, 0)
        multiprocessing.set_start_method("fork", force=True)  # for DataLoader workers, as usual
        log = os.open(self.folder / f"said-{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world)}
        if self.world > 1 or self.sharded:
            os.environ["TORCHELASTIC_RUN_ID"] = "test"  # so that Lightning starts no processes
        if self.file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, self.file_limit))
        torch.set_num_threads(1)
        os._exit(self.code())

    def code(self) -> int:
        warnings.simplefilter("ignore")
        strategy: Any = "auto"
        if self.sharded:
            strategy = ModelParallelStrategy(self.world, 1, process_group_backend="gloo")
        elif self.world > 1:
            strategy = DDPStrategy(process_group_backend="gloo")
        module = Tiny(self.folder, self.ballast, lambda *_: time.sleep(self.slow))
        options = {"strategy": strategy, "devices": self.world} | self.options
        last = {"every_n_steps": self.every}
        try:
            with signals.listen():
                trainer = train(self.folder, module=module, last=last, **options)
        except Preempted:
            return 75
        except KeyboardInterrupt:
            return 130
        except (OSError, ValueError) as error:
            print("error:", error, flush=True)
            return 1
        print("finished", trainer.global_step, flush=True)
        return 0


def read_seen(folder: Path) -> list[list[int]]:
    """Returns the sorted (step, epoch, micro-batch) of all training batches of all ranks."""
    lines = [line for path in folder.glob("seen-*.jsonl") for line in path.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_checkpoint(folder: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)
