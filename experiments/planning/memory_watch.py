"""Counts live memory by kind, and FLOPs by operator, while a step runs."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from experiments.private.torch import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    INDEX_PUT,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    active_fake_mode,
    local_piece,
    storage_key,
    tree_leaves,
)

aten = torch.ops.aten

#: Smallest allocation of PyTorch's CUDA allocator, in bytes.
SMALLEST = 512


class MemoryWatch(TorchDispatchMode):
    """Adds up FLOPs and the bytes of live storages, real or fake, and keeps the highest sum.

    Inside the block, buffers of FSDP and new tensors to fill are fake from the start. A real mask
    can index a fake tensor, and the result has a known size.
    """

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.phase = "forward"
        self.all_fake = False  # True: no tensor has numbers, so no code may read any
        self.flops = 0
        self.peak: Counter[str] = Counter()
        self.peak_phase = self.phase
        self._fake = fake
        self._now: Counter[str] = Counter()
        self._highest = 0
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}

    def own(
        self,
        modules: Sequence[nn.Module],
        optimizer: Optimizer | None = None,
        batch: Any = None,
    ) -> None:
        """Counts tensors that exist before the step. Hooks on parameters find later gradients."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._add(tensor, "weights")
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._add(parameter.grad, "gradients")
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._found_gradient)
        for tensor in tree_leaves([*optimizer.state.values()] if optimizer else []):
            self._add(tensor, "optimizer")
        for tensor in _tensors(batch) if batch else ():
            self._add(tensor, "activations")

    def __enter__(self) -> "MemoryWatch":
        self._resize = torch.UntypedStorage.resize_
        watch = self

        def resize_(self: torch.UntypedStorage, size: int) -> Any:
            result = watch._resize(self, size)
            watch._resized(self)
            return result

        torch.UntypedStorage.resize_ = resize_  # FSDP frees and refills with it; it is no operator
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the call comes again with this rank's local tensor
        kwargs = kwargs or {}
        if active_fake_mode() is not None:  # DTensor only computes a shape
            return func(*args, **kwargs)
        kind = "temporary" if self.phase != "forward" else "activations"
        made = func in _MADE and kwargs.get("dtype") not in (torch.int64, torch.bool)
        if made or self.all_fake:
            if made and func is aten.empty.memory_format:
                kind = "gathered"  # only FSDP allocates memory in this way
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
        storage = local_piece(tensor).untyped_storage()
        key = storage_key(storage)
        if key in self._live:
            return
        size = _rounded(storage.nbytes())
        self._live[key] = weakref.ref(storage, lambda _: self._drop(key)), size, kind
        self._count(kind, size)

    def _drop(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self._now[kind] -= size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if known := self._live.get(storage_key(storage)):
            reference, before, kind = known
            size = _rounded(storage.nbytes())
            self._live[storage_key(storage)] = reference, size, kind
            self._count(kind, size - before)

    def _found_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = storage_key(local_piece(parameter.grad).untyped_storage())
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
_INDEXED = (aten.index, aten.index_put, aten.index_put_, INDEX_PUT)


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replaces boolean masks by the indices where they are true."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            numbers += index.nonzero().unbind(1)
        else:
            numbers.append(index)
    return numbers


def _rounded(size: int) -> int:
    return -(-size // SMALLEST) * SMALLEST


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Returns backward FLOPs without the scores that flash attention recomputes, as MFU demands."""
    return 2 * sdpa_flop_count(query, key, value)


#: FLOP formulas that PyTorch lacks for CPU attention. Fake tensors are on the CPU.
ATTENTION = {
    CPU_ATTENTION: _attention,
    CPU_ATTENTION_BACKWARD: _attention_backward,
}

#: FLOP formulas by operator. `FlopCounterMode` is not used, because it keeps tensors of
#: checkpointed blocks alive.
_FLOPS: dict[Any, Any] = {**flop_registry, **{op: shape_wrapper(f) for op, f in ATTENTION.items()}}


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch and of the batches in it."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
