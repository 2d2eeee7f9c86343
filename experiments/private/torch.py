"""Private names of PyTorch with which `ropelab-plan` measures a step without computing it."""

from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # defines them for fake tensors
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "INDEX_PUT",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "active_fake_mode",
    "forget_shardings",
    "local_piece",
    "storage_key",
    "tree_leaves",
]

_aten = torch.ops.aten

#: Attention on the CPU, for which PyTorch has no FLOP formula. Fake tensors are on the CPU.
CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward

#: The operator behind `tensor[index] = value`.
INDEX_PUT = _aten._index_put_impl_


def local_piece(tensor: Tensor) -> Tensor:
    """Returns this rank's local tensor of a DTensor, and other tensors unchanged.

    The public `to_local` is itself an operator, which the plan would count.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def storage_key(storage: torch.UntypedStorage) -> Any:
    """Returns what identifies a live storage. A fake storage has no address."""
    return storage._cdata


def forget_shardings() -> None:
    """Empties PyTorch's cache of sharded operators.

    The cache names the ranks of a fake group and would affect a later group.
    """
    _clear_sharding_prop_cache()
