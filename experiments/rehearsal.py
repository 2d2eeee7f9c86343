"""One step of training that computes nothing: its memory and FLOPs on one of many ranks.

Weights, activations, gradients and the optimizer's state are fake tensors (shapes, no numbers);
ids, labels, masks and positions are real, since the model's Python reads them. The processes of
the other ranks are a fake group that answers at once. The step itself is the module's own.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # defines them for fake tensors
from lightning.fabric.plugins import Precision
from torch import Tensor, distributed, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from datamodules.batch import VideoBatch
from lightning_modules.flops import FlopMeter
from lightning_modules.training import TrainingModule

aten = torch.ops.aten

#: CUDA's allocator hands out no less.
_SMALLEST = 512


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
        flops: of the model, by stage, forward and backward.
        computed: FLOPs with what is computed twice to save memory.
        tokens: that the LLM learns from.
    """

    memory: dict[str, int]
    phase: str
    parameters: int
    trained: int
    trained_bytes: int
    flops: dict[str, int]
    computed: int
    tokens: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def rehearse(
    module: TrainingModule[Any],
    make_batch: Callable[[nn.Module, FakeTensorMode], VideoBatch],
    precision: Precision,
    *,
    ranks: int,
    sharded: bool,
    accumulation: int = 1,
    clip: float | None = None,
) -> Rehearsal:
    """Builds the module's model for one of `ranks` ranks and takes a step after the first.

    `precision` is the trainer's plugin. A later step, because from then on the optimizer's state
    is there, and, as Lightning has it, the gradients of the step before until the forward is done.
    """
    with _fake_group(ranks, sharded), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*You are trying to `self.log.*")
        warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
        if sharded:
            names = ("data_parallel", "tensor_parallel")
            module._device_mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)
        with precision.tensor_init_context(), torch.device("meta"):
            module.configure_model()
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            _fill(module)
        batch = make_batch(module.network, fake)
        module.train()
        return _step(module, batch, precision, fake, accumulation, clip)


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
    batch: VideoBatch,
    precision: Precision,
    fake: FakeTensorMode,
    accumulation: int,
    clip: float | None,
) -> Rehearsal:
    made: Any = module.configure_optimizers()
    optimizer: Optimizer = made["optimizer"] if isinstance(made, dict) else made
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    trained_bytes = sum(_local(p).nbytes for p in trained)
    optimizer.step()

    watch = MemoryWatch(fake)
    watch.own(module, optimizer, batch)
    meter = FlopMeter(module.network)
    with watch:
        with precision.forward_context():
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
        tokens=int(meter.tokens),
    )


class MemoryWatch(TorchDispatchMode):
    """Adds up FLOPs, and the storages that live, real or fake, whose highest sum it keeps.

    Within it, sharding's buffers and rows to be filled are fake from the start; and what a real
    mask selects from a fake tensor has a size.
    """

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.phase = "forward"
        self.flops = 0
        self.peak: Counter[str] = Counter()
        self.peak_phase = self.phase
        self._fake = fake
        self._now: Counter[str] = Counter()
        self._highest = 0
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}

    def own(self, module: nn.Module, optimizer: Optimizer, batch: VideoBatch) -> None:
        """What is there before the step; gradients are told by their parameters."""
        for tensor in [*module.parameters(), *module.buffers()]:
            self._add(tensor, "weights")
        for parameter in module.parameters():
            if parameter.grad is not None:
                self._add(parameter.grad, "gradients")
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._found_gradient)
        for tensor in tree_leaves([*optimizer.state.values()]):
            self._add(tensor, "optimizer")
        for tensor in vars(batch).values():
            self._add(tensor, "activations")

    def __enter__(self) -> "MemoryWatch":
        self._resize = torch.UntypedStorage.resize_
        watch = self

        def resize_(self: torch.UntypedStorage, size: int) -> Any:
            result = watch._resize(self, size)
            watch._resized(self)
            return result

        torch.UntypedStorage.resize_ = resize_  # no operator: sharding frees and refills so
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with this rank's piece
        kwargs = kwargs or {}
        if active_fake_mode() is not None:  # DTensor asks for a shape
            return func(*args, **kwargs)
        kind = "temporary" if self.phase != "forward" else "activations"
        if func in _MADE and kwargs.get("dtype") not in (torch.int64, torch.bool):
            if func is aten.empty.memory_format:
                kind = "gathered"  # nothing else asks for memory so
            with self._fake:
                result = func(*args, **kwargs)
        else:
            if func.overloadpacket in _INDEXED and isinstance(args[0], FakeTensor):
                args = (args[0], _as_numbers(args[1]), *args[2:])
            result = func(*args, **kwargs)
        if count := _FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            self._add(tensor, kind)
        return result

    def _add(self, tensor: Any, kind: str) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = _rounded(storage.nbytes())
        self._live[key] = weakref.ref(storage, lambda _: self._drop(key)), size, kind
        self._count(kind, size)

    def _drop(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self._now[kind] -= size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if known := self._live.get(storage._cdata):
            reference, before, kind = known
            size = _rounded(storage.nbytes())
            self._live[storage._cdata] = reference, size, kind
            self._count(kind, size - before)

    def _found_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = _local(parameter.grad).untyped_storage()._cdata
        if key in self._live:
            reference, size, kind = self._live[key]
            self._live[key] = reference, size, "gradients"
            self._now[kind] -= size
            self._now["gradients"] += size

    def _count(self, kind: str, size: int) -> None:
        self._now[kind] += size
        if (total := self._now.total()) > self._highest:
            self._highest, self.peak_phase = total, self.phase
            self.peak = self._now.copy()


_MADE = (aten.empty.memory_format, aten.full.default)
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks as the places where they are true."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            numbers += index.nonzero().unbind(1)
        else:
            numbers.append(index)
    return numbers


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _rounded(size: int) -> int:
    return -(-size // _SMALLEST) * _SMALLEST


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Without the scores that flash attention computes again, as MFU is defined."""
    return 2 * sdpa_flop_count(query, key, value)


#: What PyTorch's formulas lack: fake tensors are on the CPU.
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

#: Not by `FlopCounterMode`, which keeps hold of the tensors of blocks that run twice.
_FLOPS: dict[Any, Any] = {**flop_registry, **{op: shape_wrapper(f) for op, f in ATTENTION.items()}}


@contextmanager
def _fake_group(ranks: int, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # What PyTorch remembers of sharded operators names the fake rank, also to a later group.
        _clear_sharding_prop_cache()
