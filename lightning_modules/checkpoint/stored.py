"""Opens weights on disk as tensors by name; they are memory-mapped, so bytes are read on use."""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: Names of weight files, in order of preference; with shards, `.index.json` is appended.
_FILES = ("model.safetensors", "pytorch_model.bin")


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of a folder in transformers' layout: safetensors, else `.bin`.

    Raises:
        ValueError: there are no weights, a file is missing or truncated, or a file contains code.
    """
    for name in _FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(index)
        if (folder / name).is_file():
            return open_file(folder / name)
    raise ValueError(f"no weights in {folder}: neither {' nor '.join(_FILES)}, whole or in shards")


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of one file; raises errors as `open_weights` does."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, and code in weights is never run: if you trust the "
            "file, convert it to safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{path} is truncated or not a weights file of PyTorch ({line})") from None
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} must hold only named tensors, but holds {others[0]!r}")
    return tensors


def _open_shards(index: Path) -> dict[str, Tensor]:
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error!r})") from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names a file outside its folder: {name!r}")
        tensors |= open_file(index.parent / name)
    missing = sorted(placed.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(placed)} tensors that {index} lists are in none of its "
            f"files, such as {missing[0]}"
        )
    return tensors
