"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): ranks share the layers of each block.

Each rank holds some attention heads and some MLP channels. Query, key, value, gate and up
projections are split by rows; output and down projections by the matching columns. The results of
these two are summed over the ranks, so the tensors between blocks are whole, and the same on each
rank. transformers' own plan for a decoder says how each linear is split.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

_KEY = "trainer.strategy.tensor_parallel_size"
_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def split_blocks(blocks: Iterable[nn.Module], config: Any, mesh: DeviceMesh) -> None:
    """Splits each block of a decoder, in place; LoRA's weights are split with their linears.

    Args:
        config: the decoder's transformers config.
        mesh: has one axis; its ranks have the same weights.

    Raises:
        ValueError: heads or channels are not divisible by the number of ranks, transformers has no
            plan for the decoder, or dropout would act inside a split layer.
    """
    _check(config, mesh.size())
    plan = _plan_of_block(config)
    for block in blocks:
        parallelize_module(block, mesh, dict(_styles(block, plan)), src_data_rank=None)


def _check(config: Any, size: int) -> None:
    shared = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "channels of the MLP": config.intermediate_size,
    }
    if any(count % size for count in shared.values()):
        found = ", ".join(f"{count} {what}" for what, count in shared.items())
        most = math.gcd(*shared.values())
        legal = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ValueError(f"{_KEY}={size} does not divide {found} of model.llm: set it to {legal}")
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(
            f"{_KEY}={size} and attention_dropout {dropout} of model.llm: all ranks would use the "
            "same dropout mask for their heads; set model.llm.config.attention_dropout=0, or "
            "trainer=fsdp"
        )


def _plan_of_block(config: Any) -> dict[str, type[ParallelStyle]]:
    """Maps the path of each linear in a block to the way it is split."""
    start, plan = "layers.*.", config.base_model_tp_plan or {}
    own = {path.removeprefix(start): how for path, how in plan.items() if path.startswith(start)}
    unknown = sorted(set(own.values()) - set(_STYLES))
    if unknown or not own:
        how = (
            f"splits some of its layers as {unknown[0]}"
            if unknown
            else "does not say how to split it"
        )
        raise ValueError(
            f"model.llm is a {config.model_type}, and transformers {how}, which is not supported "
            f"here: set {_KEY}=1, or choose an llm of the Llama or Qwen2 family"
        )
    return {path: _STYLES[how] for path, how in own.items()}


def _styles(
    block: nn.Module, plan: Mapping[str, type[ParallelStyle]]
) -> Iterator[tuple[str, ParallelStyle]]:
    """Yields (path, style) for each linear, and for the half of LoRA on the linear's split side."""
    for path, style in plan.items():
        layer: Any = block.get_submodule(path)
        if isinstance(layer, nn.Linear):
            yield path, style()
            continue
        yield f"{path}.base_layer", style()
        split = "lora_B" if style is ColwiseParallel else "lora_A"
        for name in getattr(layer, split):
            yield f"{path}.{split}.{name}", style()
            dropout = getattr(layer.lora_dropout[name], "p", 0.0)
            if dropout and style is RowwiseParallel:
                raise ValueError(
                    f"tuning.lora.dropout={dropout} on {path}: with {_KEY}, each rank has "
                    "different channels of it; set tuning.lora.dropout=0, or remove "
                    f"{path.rpartition('.')[2]} from tuning.lora.targets"
                )
