"""Selects the trained parameters, their optimizer options, checkpointing and compilation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_modules.lora import is_lora


@dataclass(frozen=True)
class Tuning:
    """Tuning options: `tuning.freeze=[encoder]`, `tuning.checkpointing=[llm]`, …

    `freeze` and `groups` name parts of the network: a component (`encoder`), a path in it
    (`encoder.text.embeddings`), or a pattern with `*` and `?`. A part includes all parameters
    below it.

    Attributes:
        freeze: parts that are not trained. LoRA's own weights are always trained.
        lora: arguments of `add_lora`; stored in the model's config, and so with its weights.
        groups: optimizer options (`lr`, `weight_decay`, …) by part, which override those of
            `optim.optimizer`; None: no group. The last part that contains a parameter decides.
        decay_norms_and_biases: whether weight decay also applies to parameters of one axis.
        checkpointing: components whose blocks use activation checkpointing: they keep only their
            input, and run again in the backward pass.
        compile: components whose blocks are compiled, layer by layer.
        compiler: options of `torch.compile`: `mode`, `dynamic`, `backend`, …
    """

    freeze: Sequence[str] = ()
    lora: Mapping[str, Any] | None = None
    groups: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    decay_norms_and_biases: bool = False
    checkpointing: Sequence[str] = ()
    compile: Sequence[str] = ()
    compiler: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, network: nn.Module) -> None:
        """Applies freezing, activation checkpointing and compilation, in place.

        The names in the state dict do not change.

        Raises:
            ValueError: a part does not exist, or nothing is left to train.
        """
        if self.lora and not any(is_lora(name) for name, _ in network.named_parameters()):
            raise ValueError("this stage of training has no LoRA: choose tuning=full")
        for part in self.freeze:
            for name, parameter in _below(network, part, "freeze"):
                if not is_lora(name):
                    parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"tuning.freeze={list(self.freeze)} leaves nothing to train")
        self.parameter_groups(network)  # raises if a group is wrong
        for block in _blocks(network, self.checkpointing, "checkpointing"):
            recompute(block)
        for block in _blocks(network, self.compile, "compile"):
            compile_layers(block, self.compiler)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Returns the optimizer's parameter groups: one for each part, and one for the rest."""
        own = {part: options for part, options in self.groups.items() if options}
        owner = {name: "rest" for name, p in network.named_parameters() if p.requires_grad}
        for part in own:
            held = [name for name, _ in _below(network, part, "groups")]
            owner |= {name: part for name in held if name in owner}
        parameters = dict(network.named_parameters())
        groups = [
            {"name": part, **options, "params": [parameters[n] for n in owner if owner[n] == part]}
            for part, options in ({"rest": {}} | own).items()
        ]
        groups = [group for group in groups if group["params"]]
        return groups if own else [{"params": group["params"]} for group in groups]

    def spare_norms_and_biases(self, optimizer: Optimizer) -> None:
        """Moves parameters of one axis from groups with weight decay to groups without it."""
        if self.decay_norms_and_biases:
            return
        for group in list(optimizer.param_groups):
            flat = [p for p in group["params"] if p.ndim < 2]
            if not group.get("weight_decay") or not flat:
                continue
            group["params"] = [p for p in group["params"] if p.ndim >= 2]
            spared = {**group, "params": flat, "weight_decay": 0.0}
            if not group["params"]:
                group |= spared
                continue
            group.setdefault("name", "rest")
            optimizer.add_param_group(spared | {"name": f"{group['name']}_undecayed"})


def recompute(block: nn.Module) -> None:
    """Turns on activation checkpointing for each layer of a block.

    A layer keeps only its input and runs again in the backward pass, with the same random numbers,
    so dropout is the same. transformers wraps the layer's `forward`, inside the hooks with which
    FSDP2 gathers the weights.
    """
    for layer in _layers(block):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]


def compile_layers(block: nn.Module, options: Mapping[str, Any]) -> None:
    """Compiles each layer of a block, at its first call.

    PyTorch counts compilations per function, and transformers has one function around the layers of
    all kinds. There are five kinds of layers, in training and validation, with and without a mask.
    With PyTorch's limit of 8, layers would run uncompiled after a while, with at most a warning.
    """
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
    for layer in _layers(block):
        layer.compile(**options)


def _layers(block: nn.Module) -> list[GradientCheckpointingLayer]:
    """Returns the layers of a block: the block itself, or the layers inside BT-Adapter.

    The inputs of a layer are only tensors. BT-Adapter also takes a list of visual lengths; compiled
    as a whole, it would be compiled again for each new list, until PyTorch's limit is reached.
    """
    return [layer for layer in block.modules() if isinstance(layer, GradientCheckpointingLayer)]


def _blocks(network: nn.Module, stages: Iterable[str], key: str) -> list[nn.Module]:
    with_blocks = {
        n: m for n, m in network.named_children() if callable(getattr(m, "blocks", None))
    }
    unknown = sorted(set(stages) - set(with_blocks))
    if unknown:
        raise ValueError(
            f"tuning.{key} names {', '.join(unknown)}, but components with blocks are "
            + ", ".join(with_blocks)
        )
    return [block for stage in stages for block in with_blocks[stage].blocks()]  # pyright: ignore[reportCallIssue]


def _below(network: nn.Module, part: str, key: str) -> list[tuple[str, nn.Parameter]]:
    """Returns the (name, parameter) pairs of a part.

    Raises:
        ValueError: there is no such part; the message lists the parts at the level of the mistake.
    """
    found = [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if any(fnmatchcase(path, part) for path in _paths(name))
    ]
    if not found and not any(fnmatchcase(name, part) for name, _ in network.named_modules()):
        where, there = _nearest(network, part)
        raise ValueError(
            f"tuning.{key} names {part!r}, which is not in the model: {where} has "
            + ", ".join(there)
        )
    return found


def _paths(name: str) -> list[str]:
    """Returns all prefixes of a path: `a.b.c` -> a, a.b, a.b.c."""
    words = name.split(".")
    return [".".join(words[: n + 1]) for n in range(len(words))]


def _nearest(network: nn.Module, part: str) -> tuple[str, list[str]]:
    """Returns the longest existing prefix of a path, and the names below it."""
    where = "it"
    for path in _paths(part):
        word = path.rpartition(".")[2]
        child = dict(network.named_children()).get(word)
        if child is None:
            break
        where, network = path, child
    names = [n for n, _ in network.named_children()]
    names += [n for n, _ in network.named_parameters(recurse=False)]
    return where, names if len(names) < 12 else [*names[:11], "…"]
