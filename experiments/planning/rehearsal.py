"""One step of training that computes nothing: its memory and FLOPs on one of many ranks.

Weights, activations, gradients and the optimizer's state are fake tensors (shapes, no numbers);
ids, labels, masks and positions are real, since the model's Python reads them. The processes of
the other ranks are a fake group that answers at once. The step itself is the module's own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # defines them for fake tensors
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from datamodules.batch import PreferenceBatch, VideoBatch
from experiments.planning.memory_watch import MemoryWatch, local_piece
from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.training.base import TrainingModule

Batch = VideoBatch | PreferenceBatch


@dataclass(frozen=True)
class Rehearsal:
    """What one micro-batch of one rank takes, with the optimizer's step after it.

    Args:
        memory: bytes at the moment of the peak, by kind: weights, gradients, optimizer,
            gathered (whole weights and gradients on their way from and to the ranks that keep
            them), activations and temporary.
        phase: when the peak is: forward, backward or optimizer.
        parameters, trained: numbers of the whole model, all ranks together.
        trained_bytes: of this rank's gradients.
        flops: of the trained network, by stage, forward and backward.
        computed: FLOPs with what is computed twice to save memory, and with other networks.
        samples: of the micro-batch.
        tokens: that the LLM learns from; without an LLM, those of the captions.
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
    """Builds the module's model for one of `ranks` ranks and takes a step after the first.

    A later step, because from then on the optimizer's state is there, and, as Lightning has it,
    the gradients of the step before until the forward is done. What a trainer would have told the
    module, its mesh and its `precision`, is set on the module itself.

    Args:
        make_batch: of what the network is and the mode in which frames are fake.
        clip: the norm that gradients are clipped to.
    """
    with _fake_group(ranks), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*You are trying to `self.log.*")
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
        if sharded:
            names = ("data_parallel", "tensor_parallel")
            module._device_mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)
        with module.precision.tensor_init_context(), torch.device("meta"):
            module.configure_model()
            module.precision.convert_module(module)  # fake weights cannot be
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            for held in (module, *module.beside()):
                _fill(held)
        batch = make_batch(module.network, fake)
        module.train()
        return _step(module, batch, fake, accumulation, clip)


def _fill(module: nn.Module) -> None:
    """Gives what is on the meta device a place on the CPU; tied weights stay tied."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        module.to_empty(device="cpu")
        return
    filled: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None:
                continue
            if tensor not in filled:
                empty = torch.empty_like(tensor, device="cpu")
                learns = tensor.requires_grad
                is_weight = isinstance(tensor, nn.Parameter)
                filled[tensor] = nn.Parameter(empty, learns) if is_weight else empty
            (part._parameters if name in part._parameters else part._buffers)[name] = filled[tensor]  # pyright: ignore[reportArgumentType]


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
        # What PyTorch remembers of sharded operators names the fake rank, also to a later group.
        _clear_sharding_prop_cache()
