"""Forecasts the memory and time of one step, and of the whole training, on N ranks."""

from dataclasses import dataclass, replace
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
    epoch_steps: int | None  # of one pass over the data

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
        return self._hours(self.steps, self.ranks)

    @property
    def epoch_gpu_hours(self) -> float | None:
        return self._hours(self.epoch_steps, self.ranks)

    @property
    def hours(self) -> float | None:
        """Hours from the first to the last step."""
        return self._hours(self.steps, 1)

    def _hours(self, steps: int | None, ranks: int) -> float | None:
        return None if steps is None else steps * self.seconds * ranks / 3600

    def on(self, mfu: float, peak_flops: float) -> "Forecast":
        """Returns the same forecast for a device with another speed."""
        seconds = self.step.computed * self.accumulation / (mfu * peak_flops)
        return replace(self, seconds=seconds)


def forecast(config: DictConfig, ranks: int) -> Forecast:
    """Takes one fake step of the composed `config` on one of `ranks` ranks.

    Raises:
        ValueError: the ranks do not divide the global batch size, or a needed value is unknown.
    """
    config = without_reading(config)
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
        *_steps(config, ranks * step.samples * accumulation),
    )


def default_ranks(config: DictConfig) -> int:
    """Returns 8, or the most ranks below that share an optimizer step of the recipe."""
    sizes = (config.data.get("global_batch_size"), config.data.get("batch_size"))
    if not all(_is_count(size, 1) for size in sizes):
        return 8
    micro_batches = sizes[0] // sizes[1]
    return max((n for n in range(1, 9) if micro_batches and micro_batches % n == 0), default=8)


def usable(config: DictConfig) -> float:
    """Returns the memory of the device in GiB, without what is kept free."""
    return (1 - config.headroom) * config.device.memory_gib


def check_plan(config: DictConfig) -> None:
    """Checks the keys that only ropelab-plan has.

    Raises:
        ValueError: a value is not possible. The message says what is.
    """
    ranks = plain(config.ranks) if OmegaConf.is_config(config.ranks) else config.ranks
    named = isinstance(ranks, list) and ranks and all(_is_count(n, 1) for n in ranks)
    if not (named or ranks is None):
        raise ValueError(f"ranks={ranks} must be whole numbers of 1 or more: ranks=8,64")
    for key, least in _LEAST.items():
        value = config[key]
        optional = key in ("samples", "frames", "tokens")
        if not (_is_count(value, least) or (optional and value is None)):
            raise ValueError(f"{key}={value} must be a whole number of {least} or more")
    for key in ("mfu", "headroom", "labelled"):
        value = config[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1) or (key, value) in (("mfu", 0), ("headroom", 1)):
            raise ValueError(f"{key}={value} must be a share: a number from 0 to 1, such as 0.4")


#: Least values of the keys that count something.
_LEAST = {"samples": 1, "frames": 1, "videos": 0, "images": 0, "tokens": 1}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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


def without_reading(config: DictConfig) -> DictConfig:
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


def samples_of(config: DictConfig) -> int | None:
    """Returns the samples of an epoch: typed, planned by the datamodule, or published; or None."""
    planned = OmegaConf.select(config, "data.training.samples")
    return config.samples or planned or config.get("data_samples")


def _steps(config: DictConfig, global_batch: int) -> tuple[int | None, int | None]:
    """Returns the numbers of steps of the whole training and of an epoch; None: unknown."""
    samples = samples_of(config)
    epoch = None if samples is None else max(1, samples // global_batch)
    if (config.trainer.get("max_steps") or -1) > 0:
        return config.trainer.max_steps, epoch
    return None if epoch is None else epoch * (config.trainer.get("max_epochs") or 1), epoch


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
