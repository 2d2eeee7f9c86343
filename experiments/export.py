"""ropelab-export: writes a trained model as a folder that `from_pretrained` opens.

ropelab-export runs/ppllava_vicuna7b_video/vanilla-seed0 models/ppllava --dtype bfloat16
ropelab-export runs/videorope_qwen2_7b/mrope-seed0 models/mrope --layout qwen2_vl
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import GenerationConfig

from datamodules.common.atomic import write_whole
from datamodules.common.spec import class_name
from datamodules.errors import BadSampleError
from datamodules.processor import Processor
from experiments.console.bars import no_bars_in_files
from experiments.directory.run_directory import read_done, read_versions
from experiments.evaluate import load
from experiments.run.files import inside, read_yaml
from experiments.run.process import run_alone
from lightning_modules.importers.base import REPORT, tokenizer_files
from lightning_modules.importers.write_qwen2_vl import (
    SPECIAL_TOKENS,
    check_writable,
    write_qwen2_vl,
)
from lightning_modules.lora import merge_lora, save_adapter
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> None:
    run_alone("ropelab-export")
    no_bars_in_files()
    parser = argparse.ArgumentParser("ropelab-export", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist yet")
    parser.add_argument(
        "--checkpoint", help="file in checkpoints/, such as best.ckpt (default: the newest)"
    )
    parser.add_argument(
        "--lora",
        choices=("merged", "apart"),
        default="merged",
        help="LoRA: merged into the weights, or apart, and again in adapter/ in the format of peft",
    )
    parser.add_argument(
        "--layout",
        choices=("ropelab", "qwen2_vl"),
        default="ropelab",
        help="qwen2_vl: for transformers' own Qwen2VLForConditionalGeneration (only with its tower "
        "and scheme); RUN may also be a folder that ropelab-import wrote",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as trained)")
    options = parser.parse_args(arguments)
    try:
        export(**vars(options))
    except (ValueError, OSError, BadSampleError) as error:
        sys.exit(f"ropelab-export: {str(error).splitlines()[0]}")
    print(options.out.resolve())


def export(
    run: Path,
    out: Path,
    checkpoint: str | None = None,
    lora: str = "merged",
    dtype: str | None = None,
    layout: str = "ropelab",
) -> VideoLanguageModel:
    """Writes the folder `out` atomically. The arguments are those of the program.

    Returns:
        The model that was written.

    Raises:
        ValueError: `out` exists, `run` is not a run directory with a checkpoint, or the layout
            cannot express the model.
    """
    if out.exists():
        raise ValueError(f"{out} already exists: name another folder, or remove it")
    if layout == "qwen2_vl":
        return _export_qwen2_vl(run, out, checkpoint, lora, dtype)
    config = read_config(run)
    processor = Processor(config["data"]["frames"], config["data"]["conversation"])
    model, steps = load(run, None, checkpoint)
    if dtype:
        model.to(dtype=DTYPES[dtype])  # pyright: ignore[reportCallIssue]
    apart = lora == "apart"
    if not apart:
        merge_lora(model)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from a killed export
    model.save_pretrained(partial, max_shard_size="5GB")
    if apart:
        save_adapter(model, partial / "adapter")
    processor.save_pretrained(partial)
    GenerationConfig(**processor.generation, do_sample=False).save_pretrained(partial)
    write_whole(partial / "README.md", model_card(run, config, model, steps))
    partial.rename(out)
    return model


def _export_qwen2_vl(
    run: Path, out: Path, checkpoint: str | None, lora: str, dtype: str | None
) -> VideoLanguageModel:
    """Writes the model in Qwen2-VL's layout, with the tokenizer if there is one."""
    if lora == "apart":
        raise ValueError("--layout qwen2_vl has no place for LoRA apart: use --lora merged")
    imported = run / REPORT
    facts: dict[str, Any] = json.loads(imported.read_text())["facts"] if imported.is_file() else {}
    tokenizer = None
    if (run / "config.json").is_file():
        check_writable(vars(VideoLanguageModelConfig.from_pretrained(run)))
    else:
        config = read_config(run)
        check_writable(config["model"])
        data = config["data"]
        tokenizer = Processor(data["frames"], data["conversation"]).tokenizer
        words = tokenizer.get_vocab()
        facts = {name: words[word] for name, word in SPECIAL_TOKENS.items() if word in words}
    model, _ = load(run, None, checkpoint)
    merge_lora(model)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_qwen2_vl(model, partial, facts, DTYPES[dtype] if dtype else None)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    else:
        for file in tokenizer_files(run):
            shutil.copyfile(file, partial / file.name)
    partial.rename(out)
    return model


def read_config(run: Path) -> dict[str, Any]:
    """Returns the config of a run.

    Raises:
        ValueError: `run` is not a run directory.
    """
    config_file = inside(run, "config.yaml")
    if not config_file.is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.yaml")
    return read_yaml(config_file)


def model_card(run: Path, config: dict[str, Any], model: VideoLanguageModel, steps: int) -> str:
    """Returns the model card: training and scores in Markdown, with metadata for the hub."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = json.dumps
    command = inside(run, "command.txt")
    sources = [config["model"][stage].get("source") for stage in ("llm", "encoder")]
    return environment.get_template("model_card.md.j2").render(
        name=config["name"],
        run_name=config["run_name"],
        base_models=[source for source in sources if source],
        command=command.read_text().strip() if command.is_file() else "",
        stages={stage: getattr(model.config, stage) for stage in ("pooler", "rotary")},
        encoder=describe(model.config.encoder or {}),
        llm=describe(model.config.llm or {}),
        tuning=config.get("tuning") or {},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        recipe={key: config[key] for key in ("optim", "trainer", "seed")},
        data=config["data"],
        steps=steps,
        done=read_done(run) or {},
        **read_versions(),
    )


def describe(spec: dict[str, Any]) -> str:
    """Returns a short description of a component, such as `CausalLM (qwen2, 3 layers)`."""
    name = class_name(spec)
    sizes = spec.get("config", {})
    facts = [sizes.get("model_type"), *_layers(sizes), *_layers(sizes.get("vision", {}))]
    known = ", ".join(str(fact) for fact in facts if fact)
    return f"{name} ({known})" if known else name


def _layers(sizes: dict[str, Any]) -> list[str]:
    return [f"{sizes['num_hidden_layers']} layers"] if "num_hidden_layers" in sizes else []


if __name__ == "__main__":
    main()
