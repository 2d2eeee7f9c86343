"""FSDP2: every rank keeps a piece of each weight, gradient and moment."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 over all ranks, however many there are.

    A checkpoint is a folder with a file of each rank; any number of ranks can read it.
    """

    def __init__(self, process_group_backend: str | None = None):
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
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

    Ranks gather together, so each must run the same blocks in the same order, a block once in a
    forward. Gradients are summed in float32 whatever the precision. Weights are gathered, and
    blocks run, in the dtype `travel`; None: in their own.

    Raises:
        ValueError: weights of several dtypes would have to travel together.
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
    policy = MixedPrecisionPolicy(param_dtype=travel, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in ("generate", "log_probs"):  # what is called beside `forward`
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


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
