"""ropelab-reference: copies shards of pairs and adds a reference model's log-probabilities.

ropelab-reference experiment=ppllava_dpo run=runs/tuned data.train=pairs/ output=judged/
ropelab-train experiment=ppllava_dpo module/reference=streamed data.train=judged/train

The model and its processing of videos and text must be those of the later training, so give both
commands the same words. Each shard is written atomically. After a kill, the same command continues.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hydra
import lightning
import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig

from datamodules.common.atomic import write_whole
from datamodules.preference import RawPairs, with_reference
from datamodules.shards.pack import write_shard
from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows launchers and `run_name`
from experiments.checks.keys import check_keys
from experiments.command.values import check_values
from experiments.console.bars import no_bars_in_files
from experiments.evaluate import load
from experiments.run import process
from experiments.run.compose import build, plain, print_config, user_errors_in_one_line
from experiments.run.hydra_errors import hydra_errors_in_one_line
from lightning_modules.checkpoint.weights import sha256
from lightning_modules.training.preference.module import model_settings


@hydra_errors_in_one_line
@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="reference")
@user_errors_in_one_line
def main(config: DictConfig) -> None:
    process.run_alone("ropelab-reference")
    no_bars_in_files()
    check_keys(config)
    check_values(config)
    print_config(config)
    lightning.seed_everything(config.seed, workers=True, verbose=False)

    # 1. The model: from a run, or the one that the training would start from
    where = config.trainer
    fabric = Fabric(accelerator=where.accelerator, devices=1, precision=where.precision)
    if config.run:
        network, _ = load(Path(config.run), None)
    else:
        module = build(config.module, "module")(model=plain(config.model))
        network = module.build_initial()
    weights = sha256(network)
    model: Any = fabric.setup_module(network.requires_grad_(False).eval())
    model.mark_forward_method("log_probs")

    # 2. The data, and the settings that the log-probabilities depend on
    build(config.prepare, "prepare")
    datamodule = build(config.data, "data")
    settings = model_settings(network.config) | datamodule.settings()
    output = Path(config.output)
    claim(output, {"weights_sha256": weights, "settings": settings})

    # 3. Shard by shard. Existing shards are skipped.
    for split, shards in datamodule.shards().items():
        for number, shard in enumerate(shards):
            path = output / split / f"shard-{number:06d}.tar"
            if path.is_file():
                continue
            stream = config.data.stream
            with closing(RawPairs(shard, datamodule, stream.timeout_s)) as pairs:
                loader = pairs.loader(datamodule.batch_size, stream.num_workers)
                write_shard(path, judged(loader, model, fabric, settings))
            print(f"{path}: {len(pairs)} samples of {shard.url}")


def judged(
    batches: Any, model: Any, fabric: Fabric, settings: dict[str, str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, members) of every sample. An unreadable sample is passed on unchanged."""
    for raws, good, batch in batches:
        with torch.inference_mode():
            sums = model.log_probs(batch.to(fabric.device)).sums.tolist() if good else []
        known = dict(zip(good, sums, strict=True))
        for number, raw in enumerate(raws):
            members = with_reference(raw, known[number], settings) if number in known else raw
            yield raw["__key__"], {k: v for k, v in members.items() if not k.startswith("__")}


def claim(output: Path, made_with: dict[str, Any]) -> None:
    """Records in `reference.json` which weights and settings the shards of a folder are made with.

    Raises:
        ValueError: the folder has shards that were made with others.
    """
    path = output / "reference.json"
    former = json.loads(path.read_text()) if path.is_file() else made_with
    if former != made_with:
        then, now = ({"weights": m["weights_sha256"], **m["settings"]} for m in (former, made_with))
        key = next(key for key in now if then.get(key) != now[key])
        raise ValueError(
            f"{output} holds shards that were made with another {key} ({str(then.get(key))[:12]}, "
            f"now {now[key][:12]}): set output= to another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(made_with, indent=1))


if __name__ == "__main__":
    main()
