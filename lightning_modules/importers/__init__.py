"""Importers: convert published weights to our components; one file per published layout."""

from collections.abc import Mapping
from typing import Any

from lightning_modules.importers.base import Importer
from lightning_modules.importers.llava_next import LlavaNextImporter
from lightning_modules.importers.llava_onevision import LlavaOnevisionImporter
from lightning_modules.importers.ppllava import PPLLaVAImporter
from lightning_modules.importers.qwen2_vl import (
    Qwen2_5VLImporter,
    Qwen2VLImporter,
    Qwen2VLTextImporter,
)

IMPORTERS: tuple[type[Importer], ...] = (
    LlavaNextImporter,
    LlavaOnevisionImporter,
    PPLLaVAImporter,
    Qwen2VLImporter,  # before the other one with this architecture, which needs its name
    Qwen2VLTextImporter,
    Qwen2_5VLImporter,
)


def detect(config: Mapping[str, Any]) -> type[Importer]:
    """Returns the importer for a checkpoint with this `config.json`.

    Raises:
        ValueError: there is none; the message lists the supported architectures.
    """
    found = config.get("architectures") or []
    for importer in IMPORTERS:
        if importer.architecture in found:
            return importer
    known = ", ".join(dict.fromkeys(importer.architecture for importer in IMPORTERS))
    raise ValueError(
        f"no importer reads architectures={found} of its config.json; supported are {known}"
    )
