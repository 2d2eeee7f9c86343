"""A recipe on so many ranks -> what a step of it takes, and the whole training."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf, open_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, CLIPConfig

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Grid, VideoBatch
from experiments.rehearsal import Rehearsal, rehearse
from experiments.run import build, plain

GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """`step` is a micro-batch of one rank; `seconds` and `tokens_per_s` are of the whole step."""

    ranks: int
    batch_size: int  # samples of a micro-batch
    accumulation: int  # micro-batches of a step
    visual_tokens: int  # of a sample
    words: int  # of a sample
    step: Rehearsal
    seconds: float
    steps: int | None

    @property
    def gib(self) -> float:
        return self.step.peak / GIB

    @property
    def global_batch(self) -> int:
        return self.ranks * self.batch_size * self.accumulation

    @property
    def tokens_per_s(self) -> float:
        return self.step.tokens * self.accumulation * self.ranks / self.seconds

    @property
    def gpu_hours(self) -> float | None:
        return None if self.steps is None else self.steps * self.seconds * self.ranks / 3600


@dataclass(frozen=True)
class Sample:
    """The largest sample of a recipe, as far as it decides sizes."""

    visuals: int
    frames: int  # of each visual
    words: int | None  # None: as many as `tokens` leaves
    tokens: int | None
    labelled: float  # share of the words


def forecast(config: DictConfig, ranks: int) -> Forecast:
    """Takes one fake step of the composed `config` on one of `ranks` ranks.

    Raises:
        ValueError: the ranks do not divide the global batch, or something is not known; says what.
    """
    config = _without_reading(config)
    datamodule = build(config.data, "data")
    accumulation = datamodule.accumulation(ranks)
    sample, rows = _sample(config), datamodule.batch_size
    module = build(config.module, "module", scheduler=None)(model=plain(config.model))
    step = rehearse(
        module,
        partial(make_batch, sample=sample, rows=rows),
        _precision(config),
        ranks=ranks,
        sharded=is_sharded(config),
        accumulation=accumulation,
        clip=config.trainer.get("gradient_clip_val"),
    )
    if ranks > 1 and not is_sharded(config):  # DDP's buckets: a copy of all gradients
        step.memory["gathered"] = step.trained_bytes
    visual = sample.visuals * _visual_tokens(module.network, sample.frames)
    steps = _steps(config, ranks * rows * accumulation)
    seconds = step.computed * accumulation / (config.mfu * config.device.peak_flops)
    words = step.tokens // rows - visual
    return Forecast(ranks, rows, accumulation, visual, words, step, seconds, steps)


def is_sharded(config: DictConfig) -> bool:
    """Whether the strategy is FSDP2.

    Raises:
        ValueError: it splits layers, too.
    """
    strategy = config.trainer.get("strategy")
    if not isinstance(strategy, DictConfig):
        return False
    if strategy.get("tensor_parallel_size", 1) != 1:
        raise ValueError("ropelab-plan knows no tensor parallelism: plan with trainer=fsdp")
    return issubclass(get_class(strategy._target_), ModelParallelStrategy)


def make_batch(network: Any, fake: FakeTensorMode, sample: Sample, rows: int) -> VideoBatch:
    """`rows` samples of that size. Only the frames are fake.

    Raises:
        ValueError: the visuals leave no room for words.
    """
    size, visual = network.encoder.image_size, _visual_tokens(network, sample.frames)
    words = sample.words
    if words is None:
        words = (sample.tokens or 0) - sample.visuals * visual
    if words < 2:
        raise ValueError(
            f"{sample.visuals} x {sample.frames} frames are {sample.visuals * visual} tokens, but "
            f"tokens={sample.tokens}: set more of them, or choose a pooler that leaves less"
        )
    ids = torch.ones(rows, words + sample.visuals, dtype=torch.long)
    ids[:, : sample.visuals] = VISUAL_SLOT
    labels = ids.clone()
    labels[:, : -max(1, round(sample.labelled * words))] = IGNORE_INDEX
    prompt = torch.ones(rows, getattr(network.encoder, "context_length", 77), dtype=torch.long)
    with fake:
        count = rows * sample.visuals * sample.frames
        frames = torch.empty(count, 3, size, size, dtype=torch.uint8)
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=labels,
        frames=frames,
        frame_counts=[sample.frames] * (rows * sample.visuals),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        keys=["planned"] * rows,
    )


def _visual_tokens(network: Any, frames: int) -> int:
    return network.pooler.grid(Grid(frames, *network.encoder.grid)).size


def _without_reading(config: DictConfig) -> DictConfig:
    """The recipe with sizes in the place of sources, and nothing that runs only later."""
    config = config.copy()
    with open_dict(config):
        for stage in config.model.values():
            if isinstance(stage, DictConfig) and stage.get("source"):
                sizes = dict(_sizes(config, stage.source))
                if stage.get("dtype"):
                    sizes["dtype"] = stage.dtype
                stage.source, stage.config = None, sizes
            # Flash and flex kernels may not be here, and keep for the backward what sdpa keeps.
            if isinstance(stage, DictConfig) and stage.get("attention") not in (None, "eager"):
                stage.attention = "sdpa"
        if OmegaConf.is_missing(config.data, "train"):
            config.data.train = None
        if config.get("tuning"):
            config.tuning.compile = []
        if "init" in config:
            config.init = None
    return config


def _sizes(config: DictConfig, source: str) -> dict[str, Any]:
    """The transformers config of a hub id, folder or `.gguf` file.

    Raises:
        ValueError: it is neither known here nor to be read.
    """
    if source in config.sizes:
        return plain(config.sizes[source])
    options: dict[str, Any] = {}
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        source, options = str(path.parent), {"gguf_file": path.name}
    try:
        read = AutoConfig.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(
            f"the sizes of {source} are not known here and cannot be read: add those of its "
            "config.json to `sizes` in configs/plan.yaml, or give a folder that holds it"
        ) from error
    if isinstance(read, CLIPConfig):
        towers: Any = read
        vision, text = towers.vision_config.to_diff_dict(), towers.text_config.to_diff_dict()
        return {"vision": vision, "text": text, "projection_dim": towers.projection_dim}
    return read.to_diff_dict() | {"model_type": read.model_type}


def _sample(config: DictConfig) -> Sample:
    frames = config.frames
    keys = (
        "data.training.frames",
        *(f"data.frames.sampler.{n}" for n in ("num_frames", "max_frames")),
    )
    for key in keys:
        frames = OmegaConf.select(config, key) if frames is None else frames
    if frames is None:
        raise ValueError("the recipe does not say how many frames a visual has: set frames=")
    frames = frames if isinstance(frames, int) else max(frames)
    words = None if config.tokens else OmegaConf.select(config, "data.conversation.max_length")
    return Sample(config.visuals, frames, words, config.tokens, config.labelled)


def _steps(config: DictConfig, global_batch: int) -> int | None:
    """Of the whole training, where its length is known."""
    if (config.trainer.get("max_steps") or -1) > 0:
        return config.trainer.max_steps
    samples = config.samples or OmegaConf.select(config, "data.training.samples")
    if samples is None:
        return None
    return samples // global_batch * (config.trainer.get("max_epochs") or 1)


def _precision(config: DictConfig) -> Any:
    """The trainer's plugin, which casts weights or the forward; float16 takes no more."""
    asked = config.trainer.precision
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if asked == "16-mixed" else asked,
        logger=False,
        enable_checkpointing=False,
    )
    return trainer.precision_plugin
