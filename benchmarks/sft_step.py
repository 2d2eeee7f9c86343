"""Benchmarks a step of instruction tuning against the same step of the published way.

The published way is in `published.py`. A step is forward, backward, clipping and AdamW. The
projector and the LLM are trained, and CLIP is frozen.

`make bench` uses the size `small` on the CPU: 8 frames of 576 patches, which prompt-guided pooling
reduces to 256 tokens, 64 words of a question, and 64 of its answer (a sixth of all tokens). CLIP
has 24 layers as in CLIP-L, so its unread layer has the same share. The head is 30 % of the LLM, as
in Qwen2-0.5B. It is 7 % of Qwen2-7B and 2 % of Vicuna-7B, where a step gains less time. So the rows
of Vicuna-7B show the gain at its real size: one device, bfloat16, activation checkpointing, 32
frames. They are computed from fake tensors by `ropelab-plan`'s rehearsal of a step.

This prints a table of steps by attention and compilation on a GPU:

    python benchmarks/sft_step.py --device cuda --size 7b --checkpointing --compile off on \
        --attention sdpa flash_attention_2 flex_attention
"""

import argparse
import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from harness import Row, at_most, compare, largest_difference, peak_memory, table
from lightning.pytorch.plugins import HalfPrecision
from omegaconf import OmegaConf
from published import PublishedModel
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch, Visual, visual_fields
from experiments import CONFIG_DIR
from experiments.command.names import device_flops
from experiments.planning.rehearsal import Rehearsal, rehearse
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.tuning import Tuning

GIB = 2**30
#: transformers' configs of the published models, from ropelab-plan.
KNOWN: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "plan.yaml").sizes)
FROZEN_CLIP = Tuning(freeze=["encoder"])
CLIP_L = KNOWN["openai/clip-vit-large-patch14-336"]


@dataclass(frozen=True)
class Size:
    """The size of a model and of the samples that it reads."""

    llm: Mapping[str, Any]
    clip: Mapping[str, Any]
    frames: int  # frames of a sample's video
    words: int  # text tokens of its question
    answer: int  # text tokens of its answer


def llama(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 43 * width // 16,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }


def clip(width: int, layers: int, side: int) -> dict[str, Any]:
    heads = {"num_attention_heads": width // 64, "num_hidden_layers": layers}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, **heads}
    text = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    text |= {"num_attention_heads": 1, "num_hidden_layers": 1}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision |= {"image_size": side, "patch_size": 14}
    return {"vision": vision, "text": text, "projection_dim": 32}


QWEN2 = KNOWN["Qwen/Qwen2-7B-Instruct"]
QWEN2_1B = QWEN2 | {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
SIZES = {
    "tiny": Size(llama(64, 2, 2048), clip(64, 2, 84), frames=2, words=8, answer=4),
    "small": Size(llama(512, 12, 32_000), clip(192, 24, 336), frames=8, words=64, answer=64),
    "1b": Size(QWEN2_1B, CLIP_L, frames=64, words=512, answer=512),
    "7b": Size(QWEN2, CLIP_L, frames=64, words=512, answer=512),
    "vicuna": Size(KNOWN["lmsys/vicuna-7b-v1.5"], CLIP_L, frames=32, words=128, answer=256),
}


def specs(size: Size, attention: str = "sdpa") -> dict[str, Any]:
    return {
        "encoder": {
            "_target_": "lightning_modules.encoder.clip.ClipEncoder",
            "config": dict(size.clip),
            "context_length": None,
            "attention": attention,
        },
        "pooler": {
            "_target_": "lightning_modules.pooler.prompt_guided.PromptGuidedPooler",
            "kernel": [2, 3, 3],
        },
        "rotary": {"_target_": "lightning_modules.rotary.videorope.VideoRope"},
        "llm": {
            "_target_": "lightning_modules.llm.causal_lm.CausalLM",
            "config": dict(size.llm),
            "attention": attention,
        },
    }


def make_batch(size: Size) -> VideoBatch:
    side = size.clip["vision"]["image_size"]
    ids = torch.randint(2, 2000, (1, 1 + size.words + size.answer))
    ids[0, 0] = VISUAL_SLOT
    labels = ids.clone()
    labels[:, : -size.answer] = IGNORE_INDEX
    prompt = torch.randint(2, 2000, (1, 24))
    prompt[0, -1] = 1
    frames = torch.randint(0, 256, (size.frames, 3, side, side), dtype=torch.uint8)
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=labels,
        **visual_fields([Visual(frames)]),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        keys=["benchmark"],
    )


class Step:
    """A training step with its own model and optimizer."""

    def __init__(self, model: VideoLanguageModel, batch: VideoBatch, tuning: Tuning = FROZEN_CLIP):
        self.model, self.batch = model.train(), batch
        tuning.prepare(model)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-5, fused=True)

    def __call__(self) -> Tensor:
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self) -> Tensor:
        loss = self.model(self.batch).loss
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Returns the gradients divided by the largest absolute value among them."""
        self.backward()
        found = [p.grad for p in self.trained.values() if p.grad is not None]
        self.optimizer.zero_grad()
        largest = max(g.abs().max() for g in found)
        return [g / largest for g in found]


def build(way: type[VideoLanguageModel], spec: Mapping[str, Any]) -> VideoLanguageModel:
    torch.manual_seed(0)
    return way(VideoLanguageModelConfig(**spec))


def small_step() -> list[Row]:
    size = SIZES["small"]
    torch.manual_seed(0)
    batch = make_batch(size)
    model = build(VideoLanguageModel, specs(size))
    published = build(PublishedModel, PublishedModel.spec(specs(size)))
    published.load_state_dict(model.state_dict(), strict=False)  # its CLIP has one more layer
    ways = Step(model, batch), Step(published, batch)
    apart = largest_difference(*(way.gradients() for way in ways))
    name = "step of tuning (LLM of width 512, vocabulary 32,000; CLIP of 24 layers, 8 frames)"
    row = compare(name, *ways, at_least=1.15, repeats=10)  # repeats=3 gave gains of 1.02 to 1.33
    row = replace(row, difference=f"{apart:.0e} of gradients", met=row.met and apart <= 1e-5)
    memory = [peak_memory(way) / 2**20 for way in ways]
    return [row, at_most(f"{name}, peak memory", *memory, share=0.8, unit="MiB")]


class Published(VideoLLMModule):
    def build(self) -> VideoLanguageModel:
        return PublishedModel(VideoLanguageModelConfig(**PublishedModel.spec(self.spec)))


def reckon(way: type[VideoLLMModule], size: Size) -> Rehearsal:
    """Forecasts a step in bfloat16 on one device, with activation checkpointing as in recipes."""

    def fake_batch(network: Any, fake: Any) -> VideoBatch:
        batch = make_batch(size)
        with fake:
            pixels = torch.zeros(batch.pixels.shape, dtype=torch.uint8)
        return replace(batch, pixels=pixels)

    optimizer = partial(torch.optim.AdamW, lr=1e-5, fused=True)
    tuning = replace(FROZEN_CLIP, checkpointing=["llm", "encoder"])
    module = way(specs(size), optimizer, tuning=tuning)
    module.precision = HalfPrecision("bf16-true")
    return rehearse(module, fake_batch, ranks=1, sharded=False, clip=1.0)


def reckoned(name: str, size: Size) -> list[Row]:
    ways = [reckon(way, size) for way in (VideoLLMModule, Published)]
    kept = ("weights", "gradients", "optimizer")
    beside = [(way.peak - sum(way.memory[kind] for kind in kept)) / 2**20 for way in ways]
    work = [way.computed / 1e9 for way in ways]
    name = f"step of {name}, computed"
    return [
        at_most(f"{name}, activations at the peak", *beside, share=0.5, unit="MiB"),
        at_most(f"{name}, operations", *work, share=0.98, unit="GFLOP"),
    ]


def run() -> list[Row]:
    return [*small_step(), *reckoned("Vicuna-7B", SIZES["vicuna"])]


@dataclass(frozen=True)
class Variant:
    """The settings for one line of the device table."""

    attention: str
    compiled: bool
    way: type[VideoLanguageModel]

    def __str__(self) -> str:
        way = "published" if self.way is PublishedModel else "ours"
        return f"| {way} | {self.attention} | {'yes' if self.compiled else 'no'} |"


def measure(variant: Variant, options: argparse.Namespace) -> list[str]:
    """Returns the table cells of a step: loss, milliseconds, tokens/s, MFU and peak memory."""
    size, cuda = SIZES[options.size], options.device == "cuda"
    spec = specs(size, variant.attention)
    spec = PublishedModel.spec(spec) if variant.way is PublishedModel else spec
    blocks = ["llm", "encoder"]
    tuning = replace(
        FROZEN_CLIP,
        checkpointing=blocks if options.checkpointing else [],
        compile=blocks if variant.compiled else [],
    )
    bfloat16 = HalfPrecision("bf16-true")
    with bfloat16.tensor_init_context(), torch.device(options.device):
        step = Step(build(variant.way, spec), make_batch(size), tuning)
    with bfloat16.forward_context():
        first = float(step())  # compiles, and makes the optimizer's state
        step()
        taken = [timed(step, cuda) for _ in range(options.repeats)]
        memory = peak_of(step, cuda)
    seconds = statistics.median(taken)
    work, tokens = work_of(options.size)
    known = device_flops().get(torch.cuda.get_device_name()) if cuda else None
    mfu = f"{work / seconds / known:.1%}" if known else "-"
    return [
        f"{first:.4f}",
        f"{1000 * seconds:,.1f}",
        f"{tokens / seconds:,.0f}",
        mfu,
        f"{memory / GIB:.3f}",
    ]


def timed(step: Step, cuda: bool) -> float:
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(step: Step, cuda: bool) -> int:
    """Returns the peak bytes of a step, including weights and the optimizer's state."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    standing = [*step.model.parameters()]
    standing += [t for state in step.optimizer.state.values() for t in state.values()]
    return peak_memory(step) + sum(tensor.nbytes for tensor in standing)


@cache
def work_of(size: str) -> tuple[int, int]:
    """Returns (FLOPs, tokens) of a step as `flops.py` counts them, the same for both ways."""
    rehearsal = reckon(VideoLLMModule, SIZES[size])
    return sum(rehearsal.flops.values()), rehearsal.tokens


def device_table(options: argparse.Namespace) -> None:
    print("| step | attention | compiled | loss | ms | tokens/s | MFU | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for attention, compiled, way in product(
        options.attention, options.compile, (VideoLanguageModel, PublishedModel)
    ):
        variant = Variant(attention, compiled == "on", way)
        try:
            cells = measure(variant, options)
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
            cells = [str(error).splitlines()[0], *[""] * 4]
        print(f"{variant} {' | '.join(cells)} |", flush=True)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="A table of steps on one device, in bfloat16.")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="if left out: the rows of `make bench`"
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument(
        "--checkpointing", action="store_true", help="activation checkpointing: blocks run twice"
    )
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.device:
        device_table(options)
    else:
        print(table(run()))


if __name__ == "__main__":
    main()
