"""Counts the FLOPs of a step by component, from the shapes that the components see.

The count follows PaLM's MFU (arXiv 2204.02311, appendix B). Forward: 2 per weight and token, and 4
per pair of tokens in a row and attention channel, masked or not. Backward: the same amount for the
gradients of trained weights, and the same amount for the gradient of the input, if it is needed.
Recomputation to save memory does not count. Neither do small operations (norms, softmax, the
pooler's windows).
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_modules.recompute import is_running_again

_MATMULS = (nn.Linear, nn.Conv2d, nn.Conv3d)


class Weights(NamedTuple):
    """Sizes of blocks that run one after another on the same tokens."""

    met: int  # weights that a token is multiplied with
    trained: int  # those of them that get a gradient
    passed: int  # those of them through which a gradient flows on
    attended: int  # channels of all attention layers
    attended_back: int  # channels of the attention layers through which a gradient flows

    def flops(self, tokens: int, length: int | float, backward: bool) -> int:
        """Returns the FLOPs for `tokens` tokens, each of which attends to `length` tokens."""
        count = 2 * tokens * self.met + 4 * tokens * length * self.attended
        if backward:
            count += 2 * tokens * (self.trained + self.passed)
            count += 8 * tokens * length * self.attended_back
        return round(count)


def weigh(blocks: Iterable[nn.Module], flows: bool) -> Weights:
    """Returns the sizes of `blocks`; `flows`: the input of the first block needs a gradient."""
    met = trained = passed = attended = attended_back = 0
    for module in (module for block in blocks for module in block.modules()):
        if width := _attention_width(module):
            learns = flows or any(p.requires_grad for p in module.parameters())
            attended, attended_back = attended + width, attended_back + width * learns
        own = list(module.parameters(recurse=False))
        if isinstance(module, _MATMULS):
            size = module.weight.numel()
            met, passed = met + size, passed + size * flows
            trained += size * module.weight.requires_grad
        flows = flows or any(p.requires_grad for p in own)
    return Weights(met, trained, passed, attended, attended_back)


class FlopMeter:
    """Counts FLOPs by component, forward and backward, and the LLM's tokens while a network runs.

    Hooks are on whole components and on the few layers outside their blocks. So blocks may be
    compiled, sharded or recomputed in the backward pass. `tokens` counts tokens that are read with
    gradients, without padding. It is a tensor, because converting it would wait for the device.
    """

    def __init__(self, network: nn.Module):
        self.flops: Counter[str] = Counter()
        self.tokens: Tensor | int = 0
        self._handles: list[Any] = []
        inside: set[nn.Module] = set()
        for name, stage in network.named_children():
            if not hasattr(stage, "blocks"):
                continue
            for tower, blocks in _towers(stage):
                inside.update(module for block in blocks for module in block.modules())
                weighed = {flows: weigh(blocks, flows) for flows in (False, True)}
                self._watch(tower, partial(self._count_tower, name, weighed))
        for name, module in network.named_modules():
            if isinstance(module, _MATMULS) and module not in inside:
                self._watch(module, partial(self._count_layer, name.partition(".")[0]))

    def reset(self) -> None:
        self.flops.clear()
        self.tokens = 0

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_hook(hook))

    def _count_tower(
        self, name: str, weighed: dict[bool, Weights], tower: Any, args: Any, output: Any
    ) -> None:
        first, learns = args[0], torch.is_grad_enabled()
        if isinstance(first, list):  # visuals
            for visual in first:
                t, _, height, width = visual.frames.shape
                tokens, attended = tower.reads(t, height, width)
                weights = weighed[visual.frames.requires_grad]
                self.flops[name] += weights.flops(tokens, attended, learns)
            return
        rows, length = first.shape[:2]
        if first.ndim == 3 and learns:
            read = args[1] if len(args) > 1 else None
            self.tokens = self.tokens + (rows * length if read is None else (read != 0).sum())
        self.flops[name] += weighed[first.requires_grad].flops(rows * length, length, learns)

    def _count_layer(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
        if is_running_again():
            return
        weight: Any = layer.weight
        # SigLIP's pooling head attends to one patch at a time. The value matrix of its attention
        # has the same size as this layer, but is no module, so this layer counts twice.
        times = 2 if isinstance(layer, NonDynamicallyQuantizableLinear) else 1
        back = weight.requires_grad + args[0].requires_grad if torch.is_grad_enabled() else 0
        rows = output.numel() // weight.shape[0]
        self.flops[name] += 2 * times * weight.numel() * rows * (1 + back)


def _attention_width(module: nn.Module) -> int:
    """Returns the channels of the queries of an attention module, and 0 for other modules."""
    for name, parts in (("q_proj", 1), ("qkv", 3)):  # `qkv`: queries, keys and values in one
        if isinstance(linear := getattr(module, name, None), nn.Module):
            return int(linear.out_features) // parts  # pyright: ignore[reportArgumentType]
    return 0


def _towers(stage: Any) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Returns the modules of a component that run blocks, with their blocks.

    An encoder's text tower runs its own blocks; the component runs the others.
    """
    left, towers = list(stage.blocks()), []
    for part in stage.prompt_modules() if hasattr(stage, "prompt_modules") else ():
        own = [block for block in left if any(block is module for module in part.modules())]
        if own:
            towers.append((part, own))
            left = [block for block in left if all(block is not module for module in own)]
    return [(stage, left), *towers]
