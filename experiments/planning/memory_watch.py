"""What lives while a step runs, and what it computes: storages by kind, FLOPs by operator."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten

#: CUDA's allocator hands out no less.
SMALLEST = 512


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

    def own(self, modules: Sequence[nn.Module], optimizer: Optimizer, batch: Any) -> None:
        """What is there before the step; gradients are told by their parameters."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._add(tensor, "weights")
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._add(parameter.grad, "gradients")
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._found_gradient)
        for tensor in tree_leaves([*optimizer.state.values()]):
            self._add(tensor, "optimizer")
        for tensor in _tensors(batch):
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
        storage = local_piece(tensor).untyped_storage()
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
        key = local_piece(parameter.grad).untyped_storage()._cdata
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


def local_piece(tensor: Tensor) -> Tensor:
    """This rank's piece."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _rounded(size: int) -> int:
    return -(-size // SMALLEST) * SMALLEST


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


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Of a batch and those that it is made of."""
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
