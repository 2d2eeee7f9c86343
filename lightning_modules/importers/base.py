"""The contract of an importer, and the conversion of a published folder to our format."""

import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.checkpoint.stored import open_weights
from lightning_modules.importers.match import Allowed, Match, Rule, adopt, check, match
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig

REPORT = "import.json"

#: Files that are copied unchanged if the source has them.
_COPIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)


class Importer(ABC):
    """Maps one published layout to our components and their parameter names.

    Args:
        config: the source's `config.json`.
        clip: hub id or folder of the CLIP whose text tower the source uses; needed if its config
            cannot be read from the name in the source's config.

    Attributes:
        name: name for the command line.
        architecture: entry in `config.json` that identifies the layout.
        rules: map stored names to those of the model that `build` returns.
        schemes: the words that `rotary` may be; empty: the layout has one scheme.

    Raises:
        ValueError: `rotary` is none of `schemes`.
    """

    name: str
    architecture: str
    rules: Sequence[Rule]
    schemes: Sequence[str] = ()

    def __init__(
        self, config: Mapping[str, Any], clip: str | None = None, rotary: str | None = None
    ):
        if rotary is not None and rotary not in self.schemes:
            known = f"one of {', '.join(self.schemes)}" if self.schemes else "leave it out"
            raise ValueError(
                f"--rotary {rotary} names no scheme of checkpoints in the layout {self.name}: "
                f"{known}"
            )
        self.config, self.clip, self.rotary = dict(config), clip, rotary

    @abstractmethod
    def stages(self) -> dict[str, Any]:
        """Returns a spec for each component of the source, with sizes from its config.

        Raises:
            ValueError: the source uses something that our components do not support.
        """

    def facts(self) -> dict[str, Any]:
        """Returns fields of the source's config that are only kept in the report."""
        return {}

    def on_purpose(self) -> list[str]:
        """Returns globs of stored names that our components do not need."""
        return ["*.position_ids", "*.rotary_emb.inv_freq"]

    def build(self) -> PreTrainedModel:
        """Returns the model to fill, on torch's current default device."""
        return VideoLanguageModel(VideoLanguageModelConfig(**self.stages()))


def import_folder(
    importer: Importer,
    folder: Path,
    out: Path,
    allowed: Allowed,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Writes the model of `folder` into `out`; returns a report, which is also stored in `out`.

    Stored tensors are memory-mapped and written one shard after the other, so that the weights are
    never in memory twice.

    Args:
        importer: importer for the layout of `folder`.
        folder: folder with the published weights.
        out: folder to write.
        allowed: names that may stay unmatched.
        dtype: name of the dtype to write; None: the most common stored dtype.

    Raises:
        ValueError: files cannot be read, or names or shapes do not fit.
    """
    with torch.device("meta"):
        model = importer.build()
    stored = open_weights(folder)
    found = match(stored, model, importer.rules, importer.on_purpose())
    check(found, allowed, str(folder))
    kind = getattr(torch, dtype) if dtype else _most_common_dtype(found.values)
    fresh = _fresh(importer, found.unfilled) if found.unfilled else {}
    adopt(model, found.values | fresh, kind)
    model.save_pretrained(out, max_shard_size="2GB")
    for file in tokenizer_files(folder):
        shutil.copyfile(file, out / file.name)
    report = _report(importer, folder, found, kind)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a folder that go with any weights: tokenizer and generation config."""
    return [folder / name for name in _COPIED if (folder / name).is_file()]


def _fresh(importer: Importer, names: Sequence[str]) -> dict[str, Tensor]:
    """Returns initial values for parameters that the source lacks, from a temporary model."""
    made = importer.build().state_dict()
    return {name: made[name].clone() for name in names}


def _most_common_dtype(values: Mapping[str, Tensor]) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for value in values.values():
        counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0]


def _report(importer: Importer, folder: Path, found: Match, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "source": folder.name,
        "format": importer.name,
        "dtype": str(dtype).removeprefix("torch."),
        "stages": importer.stages(),
        "facts": importer.facts(),
        "used": {stored: ours for ours, stored in found.names.items()},
        "unused_on_purpose": found.on_purpose,
        "unused": found.unused,
        "unfilled": found.unfilled,
    }
