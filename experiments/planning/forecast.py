"""Forecasts the memory and time of one step, and of the whole training, on N ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import AutoConfig, CLIPConfig, SiglipConfig

from experiments.planning.largest_sample import Largest
from experiments.planning.rehearsal import Rehearsal, rehearse
from experiments.run.compose import build, plain

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """The forecast for one number of ranks.

    `step` describes a micro-batch of one rank. `seconds` and `tokens_per_s` describe a whole
    optimizer step.
    """

    ranks: int
    accumulation: int  # micro-batches per step and rank
    frames: int  # per sample
    visual_tokens: int  # per sample
    step: Rehearsal
    seconds: float
    steps: int | None

    @property
    def gib(self) -> float:
        return self.step.peak / GIB

    @property
    def batch_size(self) -> int:
        return self.step.samples

    @property
    def global_batch(self) -> int:
        return self.ranks * self.batch_size * self.accumulation

    @property
    def tokens_per_s(self) -> float:
        return self.step.tokens * self.accumulation * self.ranks / self.seconds

    @property
    def gpu_hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds * self.ranks / 3600


def forecast(config: DictConfig, ranks: int) -> Forecast:
    """Takes one fake step of the composed `config` on one of `ranks` ranks.

    Raises:
        ValueError: the ranks do not divide the global batch size, or a needed value is unknown.
    """
    config = _without_reading(config)
    sharded, sample = is_sharded(config), Largest.of(config)
    datamodule = build(config.data, "data")
    accumulation = datamodule.accumulation(ranks)
    module = build(config.module, "module", scheduler=None)(model=plain(config.model))
    module.check_sharing(datamodule, ranks, accumulation)
    module.precision = precision_of(config)
    step = rehearse(
        module,
        lambda network, fake: datamodule.outlined(sample.outline(network, fake)),
        ranks=ranks,
        sharded=sharded,
        accumulation=accumulation,
        clip=config.trainer.get("gradient_clip_val"),
    )
    if ranks > 1 and not sharded:  # DDP's buckets: a copy of all gradients
        step.memory["gathered"] = step.memory.get("gathered", 0) + step.trained_bytes
    return Forecast(
        ranks,
        accumulation,
        sample.all_frames,
        sample.visual_tokens(module.network),
        step,
        step.computed * accumulation / (config.mfu * config.device.peak_flops),
        _steps(config, ranks * step.samples * accumulation),
    )


def is_sharded(config: DictConfig) -> bool:
    """Returns whether the strategy is FSDP2.

    Raises:
        ValueError: the strategy also uses tensor parallelism.
    """
    strategy = config.trainer.get("strategy")
    if not isinstance(strategy, DictConfig):
        return False
    if strategy.get("tensor_parallel_size", 1) != 1:
        raise ValueError("ropelab-plan knows no tensor parallelism: plan with trainer=fsdp")
    return issubclass(get_class(strategy._target_), ModelParallelStrategy)


def _without_reading(config: DictConfig) -> DictConfig:
    """Returns the recipe with model sizes in place of model sources, without data and `init`."""
    config = config.copy()
    with open_dict(config):
        for stage in config.model.values():
            if isinstance(stage, DictConfig) and stage.get("source"):
                sizes = dict(_sizes(config, stage.source))
                if stage.get("dtype"):
                    sizes["dtype"] = stage.dtype
                stage.source, stage.config = None, sizes
            # Flash and flex kernels may be missing here. sdpa keeps as much for the backward.
            if isinstance(stage, DictConfig) and stage.get("attention") not in (None, "eager"):
                stage.attention = "sdpa"
        config.data.conversation.tokenizer = None  # only special tokens are read: any will do
        config.data.conversation.prompt_tokenizer = None
        if OmegaConf.is_missing(config.data, "train"):
            config.data.train = None
        if config.get("tuning"):
            config.tuning.compile = []
        if "init" in config:
            config.init = None
    return config


def _sizes(config: DictConfig, source: str) -> dict[str, Any]:
    """Returns the transformers config of a hub id, folder or `.gguf` file.

    Raises:
        ValueError: the config is neither listed in `sizes` nor readable.
    """
    if source in config.sizes:
        return plain(config.sizes[source])
    options: dict[str, Any] = {"trust_remote_code": False}
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        source, options = str(path.parent), options | {"gguf_file": path.name}
    try:
        read = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(
            f"the sizes of {source} are not known here and cannot be read: add those of its "
            "config.json to `sizes` in configs/plan.yaml, or give a folder that holds it"
        ) from error
    if isinstance(read, CLIPConfig | SiglipConfig):
        towers: Any = read
        vision, text = towers.vision_config.to_diff_dict(), towers.text_config.to_diff_dict()
        shared = {"projection_dim": towers.projection_dim} if isinstance(read, CLIPConfig) else {}
        return {"vision": vision, "text": text} | shared
    return read.to_diff_dict() | {"model_type": read.model_type}


def _steps(config: DictConfig, global_batch: int) -> int | None:
    """Returns the number of steps of the whole training, or None if it is unknown."""
    if (config.trainer.get("max_steps") or -1) > 0:
        return config.trainer.max_steps
    samples = config.samples or OmegaConf.select(config, "data.training.samples")
    if samples is None:
        return None
    return samples // global_batch * (config.trainer.get("max_epochs") or 1)


def precision_of(config: DictConfig) -> Any:
    """Returns the trainer's precision plugin, which casts the weights or the forward.

    "16-mixed" is planned as "bf16-mixed", because it takes the same memory.
    """
    asked = config.trainer.precision
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if asked == "16-mixed" else asked,
        logger=False,
        enable_checkpointing=False,
    )
    return trainer.precision_plugin
