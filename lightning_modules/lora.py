"""LoRA (arXiv 2106.09685) as part of a model: peft's layers replace linears of one component.

The layers are injected; the model is not wrapped. Every other module keeps its name, so blocks are
sharded, checkpointed and compiled as without LoRA. A checkpoint differs only below the replaced
linears.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from lightning_modules.private.peft import BASE_LAYER, disabled

Network = TypeVar("Network", bound=nn.Module)


def add_lora(
    network: nn.Module,
    *,
    targets: Sequence[str] | str,
    rank: int,
    alpha: int | float,
    dropout: int | float = 0.0,
    stage: str = "llm",
) -> None:
    """Adds low-rank weights to linears of one component, and freezes the component's other weights.

    Before training, they do not change the output. The new weights have torch's default dtype:
    bfloat16 if the whole model is built in bfloat16, float32 if only the loaded weights are
    bfloat16.

    Args:
        targets: the linears, given by the ends of their names or by one regular expression for the
            whole name.
        alpha: the low-rank part is multiplied by alpha / rank.
        stage: name of the component in `network`.

    Raises:
        ValueError: `network` has no such component, or `targets` match nothing in it.
    """
    part = getattr(network, stage, None)
    if not isinstance(part, nn.Module):
        raise ValueError(
            f"tuning.lora.stage={stage} is not in the model, which has "
            + ", ".join(name for name, _ in network.named_children())
        )
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)  # pyright: ignore[reportArgumentType] - the ratio may be any number
    try:
        inject_adapter_in_model(config, part)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tuning.lora, targets={names} of {stage}: {reason}") from None
    for _, layer in lora_layers(part):
        layer.register_load_state_dict_pre_hook(_take_plain_names)
    for name, parameter in part.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.to(torch.get_default_dtype())


def is_lora(name: str) -> bool:
    """Returns whether a parameter of this name belongs to LoRA."""
    return "lora_" in name


def lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]


def merge_lora(model: Network) -> Network:
    """Merges the low-rank weights into the base weights, in place, and returns `model`.

    Afterwards `model` has no LoRA layers: parameters have their plain names again, and
    `config.lora` is None.
    """
    for name, layer in lora_layers(model):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.lora = None
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """Saves only the LoRA weights, in the layout that peft reads.

    Load them with `PeftModel.from_pretrained(language model, folder)`.

    Raises:
        ValueError: the LLM of `model` has no LoRA.
    """
    stage = "llm.lm."
    layers = [name for name, _ in lora_layers(model) if name.startswith(stage)]
    if not layers:
        raise ValueError("the model has no LoRA in its llm")
    spec = dict(model.config.lora)
    LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec.get("dropout", 0.0),
        target_modules=[name.removeprefix(stage) for name in layers],
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    weights = {
        "base_model.model." + name.removeprefix(stage).replace(".default.", "."): value.contiguous()
        for name, value in model.state_dict().items()
        if is_lora(name) and name.startswith(stage)
    }
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Disables LoRA in `model` inside the context.

    Raises:
        ValueError: `model` has no LoRA, so its output would not be that of a reference model.
    """
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError("the model has no LoRA to leave out: choose tuning=lora")
    with disabled(layers):
        yield


def _take_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames weights that were saved without LoRA, so that they load into the base linears."""
    for leaf in ("weight", "bias"):
        if prefix + leaf in state:
            state[f"{prefix}{BASE_LAYER}.{leaf}"] = state.pop(prefix + leaf)
