"""Reads saved weights, computes their digest, and checks that they are finite.

Everything that opens weights of ours comes through here: resume, `init=`, evaluation and export.
Code in a file of weights is never run.
"""

import json
import math
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from datamodules.common.digest import digest_all
from lightning_modules.checkpoint.stored import open_weights
from lightning_modules.checkpoint.whole import MARKER, newest_whole, what_is_wrong
from lightning_modules.private.torch import before_compile

#: Of the network's parameters in a checkpoint of Lightning.
_PREFIX = "model."

#: A file in a folder of shards: everything but tensors.
_META = "meta.pt"


def sha256(module: nn.Module) -> str:
    """Returns a digest of the trained parameters: name, shape and little-endian float32 values.

    It is the same for one process, DDP and FSDP. All ranks must call it, because each parameter is
    gathered in turn.
    """
    return digest_all(_pieces(module), length=64)


def _pieces(module: nn.Module) -> Iterator[str | memoryview]:
    for name, parameter in sorted(_trained(module), key=lambda item: item[0]):
        value = parameter.detach()
        whole = _gathered(value) if isinstance(value, DTensor) else value
        yield f"{name} {tuple(whole.shape)}\n"
        yield whole.float().cpu().contiguous().numpy().astype("<f4").data


def _gathered(value: DTensor) -> Tensor:
    """Returns `value.full_tensor()`, gathered per mesh axis to avoid a warning of PyTorch."""
    for axis in range(value.device_mesh.ndim):
        placements = [Replicate()] * (axis + 1) + list(value.placements[axis + 1 :])
        value = value.redistribute(placements=placements)
    return value.to_local()


def finite_everywhere(tensors: Iterable[Tensor]) -> bool:
    """Returns whether no tensor of any rank contains NaN or Inf; reduces one number over all ranks.

    Each rank may pass different tensors, but at least one. Of sharded tensors, it checks its shard.
    """
    pieces = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    largest = get_total_norm([piece for piece in pieces if piece.numel()], math.inf)
    finite = largest.isfinite().to(pieces[0].device, torch.int32)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(finite, distributed.ReduceOp.MIN)
    return bool(finite)


class Saved(NamedTuple):
    """A saved network.

    Attributes:
        path: the file or folder that was opened.
        weights: tensors by the network's parameter names, memory-mapped.
        specs: specs of the components; empty if they are unknown.
        checkpoint: everything else in the checkpoint; empty for a folder in transformers' layout.
    """

    path: Path
    weights: dict[str, Tensor]
    specs: dict[str, Any]
    checkpoint: dict[str, Any]


def open_saved(place: Path, key: str, name: str | None = None) -> Saved:
    """Opens a saved network.

    Args:
        place: a run directory, one of its checkpoints, or a folder that `save_pretrained` or
            ropelab-import wrote.
        key: the setting that names the place, for errors.
        name: file name of a checkpoint of the run directory; by default the newest whole one.

    Raises:
        ValueError: there are no weights, they are damaged, or they are not of ropelab.
    """
    if (place / "config.json").is_file():
        config = json.loads((place / "config.json").read_text())
        if config.get("model_type") != "ropelab":
            raise ValueError(
                f"{key}={place} holds a model of type {config.get('model_type')!r}: convert it "
                "with ropelab-import first"
            )
        return Saved(place, open_weights(place), config, {})
    path = _find(place, key, name)
    checkpoint = read_checkpoint(path)
    state = checkpoint.pop("state_dict")
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
    return Saved(path, weights, checkpoint.get("stages", {}), checkpoint)


def _find(place: Path, key: str, name: str | None) -> Path:
    if not place.exists():
        raise ValueError(f"{key}={place} does not exist: set {key} to a folder or a checkpoint")
    path: Path | None = place
    if place.is_dir() and not any((place / file).exists() for file in (MARKER, _META)):
        folder = place / "checkpoints"
        path = newest_whole(folder) if name is None else folder / name
        if path is None or not path.exists():
            wanted = f"checkpoint {name}" if name else "checkpoint"
            raise ValueError(f"no {wanted} in {place}: set {key}= to a run directory with one")
    if wrong := what_is_wrong(path):
        raise ValueError(f"{key}={path} {wrong}")
    return path


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Reads a checkpoint file, or a sharded checkpoint without its optimizer state, on the CPU.

    Args:
        mmap: whether tensors of a file are read on use. Then unused ones, such as the optimizer's
            moments, are never read.
    """
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    checkpoint = torch.load(path / _META, map_location="cpu", weights_only=True)
    reader, prefix = _PlainReader(path), "state_dict."
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in stored.items()
        if key.startswith(prefix) and isinstance(about, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # loading in a single process is intended
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
        load(state, storage_reader=reader, no_dist=True)
    weights = {key.removeprefix(prefix): value for key, value in state.items()}
    return {**checkpoint, "state_dict": weights}


def read_facts(path: Path) -> dict[str, Any]:
    """Reads a checkpoint without its weights: steps, loops, the state of data and callbacks.

    Tensors have shapes but no values, so nothing large is read.
    """
    file = path / _META if path.is_dir() else path
    return torch.load(file, map_location="meta", weights_only=True, mmap=True)


class _PlainReader(FileSystemReader):
    """PyTorch's reader of sharded checkpoints, with a safe reader of the pickle `.metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that allows only classes that describe tensors and their location."""

    _named: Mapping[str, set[str]] = {
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
        "torch": {"Size"} | {n for n, v in vars(torch).items() if isinstance(v, torch.dtype)},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            *("TensorProperties", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "BytesStorageMetadata"),
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._named.get(module, ()):
            raise ValueError(f"a sharded checkpoint names {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def _trained(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields the trained parameters, resharded, with their names before `torch.compile`.

    After a forward without backward, weights outside of blocks stay gathered, in the dtype in which
    they were gathered. So all modules are resharded first.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield before_compile(name), parameter
