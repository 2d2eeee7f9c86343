"""FSDP2: every rank keeps a piece of each weight, gradient and moment.

With tensor parallelism ranks are a grid of two axes. Those of a row share the layers of the LLM and
read the same batch; those of a column read different batches, and shard what they have alike: of
the split layers their share, of all others the whole.
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

from lightning_modules.llm.base import LanguageModel


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all ranks, however many there are.

    A checkpoint is a folder with a file of each rank; any number of ranks can read it.

    Args:
        tensor_parallel_size: ranks in a row that share the layers of the LLM; best of one node.

    Raises:
        ValueError: there is no such number.
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
        """How batches are shared among the ranks that read different ones, from the start on.

        Raises:
            ValueError: the ranks do not make whole rows.
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

    `mesh` has the axes `data_parallel` and `tensor_parallel`. Where the second has more than one
    rank, these first split the blocks of the LLM among them.

    Ranks gather together, so each must run the same blocks in the same order, a block once in a
    forward. Gradients are summed in float32 whatever the precision. Weights are gathered, and
    blocks run, in the dtype `travel`; None: in their own.

    Raises:
        ValueError: weights of several dtypes would have to travel together, or the layers cannot
            be shared.
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
    _split_layers(model, mesh["tensor_parallel"])
    policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32)
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh["data_parallel"], mp_policy=policy)
    for name in ("generate", "log_probs"):  # what is called beside `forward`
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    if mesh.size() == 1:
        return
    llm = getattr(model, "llm", None)
    if not isinstance(llm, LanguageModel):
        raise ValueError(
            f"trainer.strategy.tensor_parallel_size={mesh.size()} splits the layers of an llm, and "
            "this stage of training has none: set trainer=fsdp"
        )
    llm.split(mesh)


@torch.no_grad()
def agree_on_gradients(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Of what is not split all ranks of a row, `mesh`, take the gradients of the first.

    They are alike but for the order in which a GPU adds. Where a gradient is next to nothing, AdamW
    makes whole steps of that, and the weights of a row would drift apart.
    """
    if mesh.size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and _copies(parameter.grad) > 1:
            distributed.broadcast(_piece(parameter.grad), group=mesh.get_group(), group_src=0)


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], largest: float) -> None:
    """`clip_grad_norm_` of shards; PyTorch's takes none that are spread over different ranks.

    All ranks must ask. They get the same norm, to the last bit: one number is reduced over all.
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
    """Ranks that have the same piece."""
    if not isinstance(tensor, DTensor):
        return distributed.get_world_size()
    mesh, placements = tensor.device_mesh, tensor.placements
    split = [mesh.size(axis) for axis, place in enumerate(placements) if not place.is_replicate()]
    return distributed.get_world_size() // math.prod(split)


def _piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_outside_of_blocks(model: nn.Module) -> Iterator[None]:
    """Where parts of a sharded model are called one by one: blocks gather their own weights."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
