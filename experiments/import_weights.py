"""ropelab-import: converts published weights to a folder that every other program opens.

ropelab-import llava-hf/llava-v1.6-vicuna-7b-hf weights/llava-next
ropelab-train init=weights/llava-next experiment=…
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from experiments.console.bars import no_bars_in_files
from experiments.run.process import run_alone
from lightning_modules.importers import IMPORTERS, Importer, detect
from lightning_modules.importers.base import REPORT, import_folder
from lightning_modules.importers.match import Allowed
from lightning_modules.importers.qwen2_vl import Qwen2VLImporter

#: File patterns to download. They never match code: `.py` files are not fetched at all.
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-import")
    no_bars_in_files()
    options = _parser().parse_args(arguments)
    try:
        # 1. The source folder and its layout
        folder = fetch(options.source)
        if options.out.exists() and any(options.out.iterdir()):
            raise ValueError(f"{options.out} is not empty: choose another folder to write into")
        config = read_config(folder)
        importer = choose(options.format, config)(config, options.clip, options.rotary)

        # 2. Puts every tensor in its place, or reports the tensors that are left over in one line
        allowed = Allowed(options.allow_unused, options.allow_unfilled, "--allow-{}")
        report = import_folder(importer, folder, options.out, allowed, options.dtype)
    except (ValueError, OSError) as error:  # errors that the user can fix, in one line
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2

    # 3. The summary
    left = len(report["unused_on_purpose"]) + len(report["unused"])
    print(
        f"{options.out}: {len(report['used'])} tensors of {report['format']} in "
        f"{report['dtype']}, {left} unused, {len(report['unfilled'])} start fresh ({REPORT})"
    )
    return 0


def fetch(source: str) -> Path:
    """Returns the folder `source`, or downloads a hub id and returns its folder in the cache.

    Raises:
        ValueError: `source` is neither a folder nor a readable hub id.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    try:
        folder = Path(snapshot_download(source, allow_patterns=list(_FETCHED)))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.bin"])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source!r} is neither a folder nor a hub id that can be read: {line}"
        ) from None
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json` of a folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"no config.json in {folder}") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error})") from None


def choose(name: str, config: dict[str, Any]) -> type[Importer]:
    """Returns the importer called `name`. For `auto`, `config.json` decides."""
    if name == "auto":
        return detect(config)
    return next(importer for importer in IMPORTERS if importer.name == name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ropelab-import",
        description="Writes published weights as a folder that ropelab-train init=… starts from.",
    )
    parser.add_argument("source", help="hub id or folder")
    parser.add_argument("out", type=Path, help="folder to write")
    names = ["auto", *(importer.name for importer in IMPORTERS)]
    parser.add_argument("--format", choices=names, default="auto")
    kinds = ["float32", "bfloat16", "float16"]
    parser.add_argument(
        "--dtype", choices=kinds, help="type of the weights (default: that of most of them)"
    )
    parser.add_argument("--clip", help="hub id or folder of PPLLaVA's CLIP, for its config")
    parser.add_argument(
        "--rotary",
        metavar="WORD",
        help="scheme that a checkpoint of Qwen2-VL's layout was trained with: "
        f"{', '.join(Qwen2VLImporter.schemes)}",
    )
    for kind, what in (
        ("unused", "keys of the source that may have no place"),
        ("unfilled", "parameters of the model that may start fresh"),
    ):
        parser.add_argument(
            f"--allow-{kind}", nargs="*", default=[], metavar="GLOB", help=f"globs of {what}"
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
