"""What of a network is trained, with which rates, and how its blocks run for that."""

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
    """One word each of the command line: `tuning.freeze=[encoder]`, `tuning.checkpointing=[llm]`.

    `freeze` and `groups` name parts of the network: a stage (`encoder`), a path in it
    (`encoder.text.embeddings`), or either with `*` and `?`; with a part go all parameters below.

    Attributes:
        freeze: parts that are not trained. LoRA's own weights always are.
        lora: arguments of `add_lora`, kept in the model's config and so with its weights.
        groups: options of the optimizer (`lr`, `weight_decay`, …) by part, in the place of those
            of `optim.optimizer`; None: no group. The last part that holds a parameter decides.
        decay_norms_and_biases: whether weight decay pulls at parameters of one axis, too.
        checkpointing: stages whose blocks keep their input alone, and run again in the backward.
        compile: stages whose blocks are compiled, layer by layer.
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
        """Freezes, checkpoints and compiles, in place; names in the state dict stay.

        Raises:
            ValueError: a part that is not there, or nothing left to train.
        """
        if self.lora and not any(is_lora(name) for name, _ in network.named_parameters()):
            raise ValueError("this stage of training has no LoRA: choose tuning=full")
        for part in self.freeze:
            for name, parameter in _below(network, part, "freeze"):
                if not is_lora(name):
                    parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ValueError(f"tuning.freeze={list(self.freeze)} leaves nothing to train")
        self.parameter_groups(network)  # a mistake in them shows here
        for block in _blocks(network, self.checkpointing, "checkpointing"):
            recompute(block)
        for block in _blocks(network, self.compile, "compile"):
            compile_layers(block, self.compiler)

    def parameter_groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """What is trained, as an optimizer takes it: a group of each part, and one of the rest."""
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
        """Splits each group that decays: what has one axis goes into a group that does not."""
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
    """Has each layer of a block keep its input alone, and run again when gradients come by.

    Random numbers are drawn again as they were, so dropout is the same. transformers wraps the
    layer's `forward`, inside of the hooks by which FSDP2 gathers its weights.
    """
    for layer in _layers(block):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]


def compile_layers(block: nn.Module, options: Mapping[str, Any]) -> None:
    """Has each layer of a block run compiled from its first call on.

    PyTorch counts what it has compiled by function, and transformers has one around the layers of
    all kinds. At PyTorch's limit of 8 the layers of five kinds, in training and in validation, with
    a mask and without, would run uncompiled after a while, with a warning at most.
    """
    torch.compiler.config.recompile_limit = max(64, torch.compiler.config.recompile_limit)
    for layer in _layers(block):
        layer.compile(**options)


def _layers(block: nn.Module) -> list[GradientCheckpointingLayer]:
    """The block itself, or those that it runs as often as lengths of visuals ask for.

    Their inputs are tensors alone. Compiled as a whole, such a block would be compiled again for
    every list of lengths, and after eight of them no more.
    """
    return [layer for layer in block.modules() if isinstance(layer, GradientCheckpointingLayer)]


def _blocks(network: nn.Module, stages: Iterable[str], key: str) -> list[nn.Module]:
    with_blocks = {
        n: m for n, m in network.named_children() if callable(getattr(m, "blocks", None))
    }
    unknown = sorted(set(stages) - set(with_blocks))
    if unknown:
        raise ValueError(
            f"tuning.{key} names {', '.join(unknown)}, but stages with blocks are "
            + ", ".join(with_blocks)
        )
    return [block for stage in stages for block in with_blocks[stage].blocks()]  # pyright: ignore[reportCallIssue]


def _below(network: nn.Module, part: str, key: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a part, by name.

    Raises:
        ValueError: there is no such part; the line names those beside which it was looked for.
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
    """`a.b.c` -> a, a.b, a.b.c."""
    words = name.split(".")
    return [".".join(words[: n + 1]) for n in range(len(words))]


def _nearest(network: nn.Module, part: str) -> tuple[str, list[str]]:
    """How far a path leads, and where one can go from there."""
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
