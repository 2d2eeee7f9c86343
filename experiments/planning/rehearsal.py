"""Measures the memory and FLOPs of one training step on one of N ranks, without computing it.

Weights, activations, gradients and the optimizer's state are fake tensors (shapes without numbers).
Ids, labels, masks and positions are real, because the model's Python code reads them. A fake
process group stands for the other ranks and answers at once. The module takes its own real step.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from datamodules.batch import PreferenceBatch, VideoBatch
from experiments.planning.memory_watch import MemoryWatch
from experiments.private.torch import FakeStore, FakeTensorMode, forget_shardings, local_piece
from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.private.lightning import set_device_mesh
from lightning_modules.training.base import TrainingModule

Batch = VideoBatch | PreferenceBatch


@dataclass(frozen=True)
class Rehearsal:
    """Memory and FLOPs of one micro-batch on one rank, with the optimizer step after it.

    Args:
        memory: bytes at the moment of the peak, by kind: weights, gradients, optimizer, gathered
            (whole weights and gradients during communication between ranks), activations and
            temporary.
        phase: phase of the peak: forward, backward or optimizer.
        parameters, trained: numbers of all and of trained parameters, over all ranks.
        trained_bytes: bytes of this rank's gradients.
        flops: forward and backward FLOPs of the trained network, by component.
        computed: all FLOPs, with activation checkpointing and other networks.
        samples: samples of the micro-batch.
        tokens: tokens that the LLM is trained on; without an LLM, tokens of the captions.
    """

    memory: dict[str, int]
    phase: str
    parameters: int
    trained: int
    trained_bytes: int
    flops: dict[str, int]
    computed: int
    samples: int
    tokens: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def rehearse(
    module: TrainingModule[Any],
    make_batch: Callable[[Any, FakeTensorMode], Batch],
    *,
    ranks: int,
    sharded: bool,
    accumulation: int = 1,
    clip: float | None = None,
) -> Rehearsal:
    """Builds the module's model for one of `ranks` ranks and measures its second step.

    From the second step on, the optimizer's state exists. Lightning also keeps the gradients of the
    previous step until the forward is done. The device mesh and `precision`, which a trainer would
    give to the module, are set on the module itself.

    Args:
        module: the module to measure.
        make_batch: makes a batch from the network and the mode in which frames are fake.
        ranks: number of ranks.
        sharded: whether the ranks shard the model (FSDP2).
        accumulation: micro-batches per optimizer step.
        clip: norm to clip gradients to.
    """
    with _fake_group(ranks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*You are trying to `self.log.*")
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
        if sharded:
            names = ("data_parallel", "tensor_parallel")
            mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)
            set_device_mesh(module, mesh)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        build_fake(module, fake)
        batch = make_batch(module.network, fake)
        module.train()
        return _step(module, batch, fake, accumulation, clip)


def build_fake(module: TrainingModule[Any], fake: FakeTensorMode) -> None:
    """Builds the model of a module, and of the modules beside it, with fake weights."""
    with module.precision.tensor_init_context(), torch.device("meta"):
        module.configure_model()
        module.precision.convert_module(module)  # now, as fake weights cannot be converted
    with fake:
        for held in (module, *module.beside()):
            _fill(held)


def _fill(module: nn.Module) -> None:
    """Replaces tensors on the meta device by empty CPU tensors. Tied weights stay tied."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        module.to_empty(device="cpu")
        return
    filled: dict[Tensor, Tensor] = {}
    for part in module.modules():
        own: dict[str, Any] = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*part.named_parameters(**own), *part.named_buffers(**own)]:
            if tensor not in filled:
                empty = torch.empty_like(tensor, device="cpu")
                learns = tensor.requires_grad
                is_weight = isinstance(tensor, nn.Parameter)
                filled[tensor] = nn.Parameter(empty, learns) if is_weight else empty
            setattr(part, name, filled[tensor])


def _step(
    module: TrainingModule[Any],
    batch: Batch,
    fake: FakeTensorMode,
    accumulation: int,
    clip: float | None,
) -> Rehearsal:
    made: Any = module.configure_optimizers()
    optimizer: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    trained_bytes = sum(local_piece(p).nbytes for p in trained)
    optimizer.step()

    watch = MemoryWatch(fake)
    watch.own([module, *module.beside()], optimizer, batch)
    meter = FlopMeter(module.network)
    with watch:
        with module.precision.forward_context():
            loss: Any = module.training_step(batch, 0)
        if accumulation == 1:
            optimizer.zero_grad()
        watch.phase = "backward"
        loss.backward()
        watch.phase = "optimizer"
        if clip:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return Rehearsal(
        memory=dict(watch.peak),
        phase=watch.peak_phase,
        parameters=sum(p.numel() for p in module.parameters()),
        trained=sum(p.numel() for p in trained),
        trained_bytes=trained_bytes,
        flops=dict(meter.flops),
        computed=watch.flops,
        samples=len(batch),
        tokens=int(meter.tokens) or _caption_tokens(batch),
    )


def _caption_tokens(batch: Batch) -> int:
    read = batch if isinstance(batch, VideoBatch) else batch.chosen
    return int(read.prompt_mask.sum())


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    if ranks == 1:
        yield
        return
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        forget_shardings()
