"""FSDP2: every rank keeps a shard of each weight, gradient and moment.

With tensor parallelism, the ranks form a mesh of two axes. Tensor-parallel ranks share the layers
of the LLM and read the same batch. Data-parallel ranks read different batches, and shard the
weights that they have in common: their part of the split layers, and all other layers.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lightning_modules.distributed.blank import always_encode
from lightning_modules.encoder.base import Encoder
from lightning_modules.llm.base import LanguageModel


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy over all ranks.

    A checkpoint is a folder with one file per rank; any number of ranks can read it.

    Args:
        tensor_parallel_size: number of consecutive ranks that share the layers of the LLM; keep
            them on one node.

    Raises:
        ValueError: `tensor_parallel_size` is less than 1.
    """

    def __init__(self, process_group_backend: str | None = None, tensor_parallel_size: int = 1):
        if tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size is {tensor_parallel_size}; set it to 1 or more")
        super().__init__(
            tensor_parallel_size=tensor_parallel_size, process_group_backend=process_group_backend
        )
        self.tensor_parallel_size = tensor_parallel_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Returns the number of data-parallel ranks and this process's data rank.

        Raises:
            ValueError: the number of ranks is not divisible by `tensor_parallel_size`.
        """
        size, world = self.tensor_parallel_size, self.world_size
        if world % size:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={size} does not divide {world} ranks: set "
                "it to a divisor, or trainer.devices to a multiple"
            )
        return {"num_replicas": world // size, "rank": self.global_rank // size}

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes // self.tensor_parallel_size
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if Path(checkpoint_path).is_file():
            raise ValueError(
                f"{checkpoint_path} was saved as one file: go on with trainer=ddp or a single "
                "process, on any number of ranks, or start anew with resume=false"
            )
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    travel: torch.dtype | None = None,
) -> None:
    """Shards `model` in place: each block gathers its weights when it runs, the rest all at once.

    `mesh` has the axes `data_parallel` and `tensor_parallel`. If the second axis has more than one
    rank, the blocks of the LLM are first split over it.

    Ranks gather together. So each rank must run the same blocks in the same order, and each block
    once per forward. Gradients are always summed in float32. Weights are gathered, and blocks run,
    in the dtype `travel`; None: in their own dtype.

    Raises:
        ValueError: the trained weights have several dtypes, or the layers cannot be split.
    """
    if isinstance(model, FSDPModule):
        return
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"weights of {found} cannot be trained together in shards: set trainer.precision and "
            "model.llm.dtype to the same, such as bf16-true and bfloat16"
        )
    blocks = list(blocks)
    for module in model.modules():
        if isinstance(module, Encoder):
            always_encode(module)
    _split_layers(model, mesh["tensor_parallel"])
    policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32)
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh["data_parallel"], mp_policy=policy)
    for name in ("generate", "log_probs"):  # called directly, like `forward`
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    if mesh.size() == 1:
        return
    llm = getattr(model, "llm", None)
    if not isinstance(llm, LanguageModel):
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size={mesh.size()} splits the layers of an llm, but "
            "this stage of training has no llm: set trainer=fsdp"
        )
    llm.split(mesh)


@torch.no_grad()
def agree_on_gradients(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Copies the gradients of unsplit weights from the first rank of `mesh` to the others.

    `mesh` holds tensor-parallel ranks. Their gradients differ only by the order of additions on a
    GPU. But if a gradient is close to zero, AdamW turns such differences into full steps, and the
    weights would diverge.
    """
    if mesh.size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and _copies(parameter.grad) > 1:
            distributed.broadcast(_piece(parameter.grad), group=mesh.get_group(), group_src=0)


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], largest: float) -> None:
    """Clips the gradient norm of sharded weights, like `clip_grad_norm_`.

    PyTorch's function does not accept shards on different meshes. All ranks must call this one.
    They get the same norm to the last bit, because one number is reduced over all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if largest <= 0 or not gradients:
        return
    by_copies: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        by_copies.setdefault(_copies(gradient), []).append(_piece(gradient))
    squares = [get_total_norm(own).float().square() / n for n, own in by_copies.items()]
    total = torch.stack(squares).sum()
    distributed.all_reduce(total)
    factor = (largest / (total.sqrt() + 1e-6)).clamp(max=1)
    for piece in chain.from_iterable(by_copies.values()):
        piece.mul_(factor)


def _copies(tensor: Tensor) -> int:
    """Returns the number of ranks that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return distributed.get_world_size()
    mesh, placements = tensor.device_mesh, tensor.placements
    split = [mesh.size(axis) for axis, place in enumerate(placements) if not place.is_replicate()]
    return distributed.get_world_size() // math.prod(split)


def _piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_outside_of_blocks(model: nn.Module) -> Iterator[None]:
    """Gathers the weights outside of blocks, so that parts of a sharded model can be called alone.

    Blocks still gather their own weights.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
