"""Forecasts the memory, FLOPs and hours of a needle test on one GPU."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from omegaconf import DictConfig
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VideoBatch
from datamodules.haystack.cells import GridPlan, NeedleGrid
from datamodules.haystack.datamodule import HaystackDataModule, video
from datamodules.haystack.needle import Needle
from datamodules.instruct import Sample, collater
from datamodules.sample.outline import Outline
from experiments.planning.forecast import precision_of, without_reading
from experiments.planning.largest_sample import Largest
from experiments.planning.memory_watch import MemoryWatch
from experiments.planning.rehearsal import build_fake
from experiments.private.torch import FakeTensorMode
from experiments.run.compose import build, plain
from lightning_modules.callbacks.flops import weigh
from lightning_modules.metrics.needle.prefix import CHUNK_TOKENS, PrefixCache, first_predicting
from lightning_modules.metrics.needle.scores import encode_frames
from lightning_modules.model import VideoLanguageModel
from lightning_modules.tokens import VisualTokens

#: Text tokens of a question with its answer, and of the answer. They hardly matter.
_WORDS, _ANSWER = 64, 8


@dataclass(frozen=True)
class NeedleForecast:
    """The forecast of a needle test whose rows are read alone, on one GPU.

    Args:
        rows: number of rows: conditions x lengths x depths x needles, and the canaries.
        frames, tokens: of the longest row.
        memory: bytes at the moment of the peak, in the longest row: weights, cache (keys and
            values) and the rest.
        row_flops: FLOPs of the longest row, read from its first token.
        flops: FLOPs of the whole test.
        unshared_flops: those of a test in which each row is read from its first token.
    """

    rows: int
    frames: int
    tokens: int
    memory: dict[str, int]
    row_flops: int
    flops: int
    unshared_flops: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def forecast_needles(config: DictConfig) -> NeedleForecast:
    """Reads the longest row of `data.grid` with fake tensors.

    Raises:
        ValueError: a needed value is unknown.
    """
    config = without_reading(config)
    datamodule: HaystackDataModule = build(config.data, "data")
    module = build(config.module, "module", scheduler=None)(model=plain(config.model))
    module.precision = precision_of(config)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    build_fake(module, fake)
    network: VideoLanguageModel = module.network.eval()

    longest = max(datamodule.grid.frames)
    text = _text(datamodule, longest)
    size = Largest.of(config).frame_size(network, 1)
    watch = MemoryWatch(fake)
    watch.own([module])
    # The LLM's masks are fake too: a real one for 400,000 tokens takes long to make.
    network.llm.register_forward_pre_hook(lambda *_: setattr(watch, "all_fake", True))
    network.llm.register_forward_hook(lambda *_: setattr(watch, "all_fake", False))
    with watch, torch.no_grad(), module.precision.forward_context():
        parts = _bank(longest + datamodule.grid.needles, size, fake)
        patches = encode_frames(network.encoder, parts)
        once = watch.flops
        videos = [
            VisualTokens.on_grid(patches[torch.arange(longest)], seconds=text.infos[0].seconds)
        ]
        inputs = network.compose(text, videos)
        composed = watch.flops - once
        prefixes, start = PrefixCache(network), first_predicting(inputs.labels)
        states = prefixes.hidden(inputs, start)
        read_llm = watch.flops
        network.llm.head(states[0, :-1][inputs.labels[0, start + 1 :] != IGNORE_INDEX]).float()
    row, head = watch.flops - once, watch.flops - read_llm

    tokens = inputs.mask.shape[1]
    orders = list(_orders(datamodule.grid))
    words = text.input_ids.shape[1] - 1  # one is the place of the video
    read = _ReadingCost(network, (tokens - words) / longest, words)
    shared = read.of_rows(orders, sharing=not network.pooler.uses_prompt)
    beside = once + composed * sum(map(len, orders)) // longest + head * len(orders)
    memory = {"weights": watch.peak["weights"], "cache": prefixes.cached_bytes()}
    memory["rest"] = watch.peak.total() - sum(memory.values())
    return NeedleForecast(
        rows=len(orders),
        frames=longest,
        tokens=tokens,
        memory=memory,
        row_flops=once + row,
        flops=beside + shared,
        unshared_flops=beside + read.of_rows(orders, sharing=False),
    )


def _text(datamodule: HaystackDataModule, frames: int) -> Any:
    """Returns a batch of one row about a video of placeholder frames."""
    stand_in = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(frames, -1, -1, -1)
    outline = Outline([video(stand_in)], _WORDS, _ANSWER)
    text = datamodule.conversation.outlined(outline)
    return collater(datamodule.conversation)([Sample("outline", text, [*outline.visuals])])


def _bank(count: int, size: tuple[int, int], fake: FakeTensorMode) -> Iterator[Tensor]:
    """Yields the frames as they come to the device, some at a time."""
    for part in torch.zeros(count).split(64):
        with fake:
            frames = torch.empty(len(part), 3, *size, dtype=torch.uint8)
        yield frames


def _orders(plan: GridPlan) -> Iterator[Int[Tensor, " t"]]:
    """Yields the frames of each row, in the order in which rows are read."""
    pixel = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)  # only the order of the frames matters
    needles = [Needle(pixel[0], f"question {n}", "", "") for n in range(plan.needles)]
    clip = pixel.expand(max(plan.frames), -1, -1, -1)
    grid = NeedleGrid([clip], needles, plan, _no_text)
    for cell in range(len(grid)):
        yield from grid.orders(cell)


def _no_text(*_: Any) -> VideoBatch:
    raise NotImplementedError("the plan reads no text")


class _ReadingCost:
    """FLOPs of the LLM that reads rows one after the other.

    Args:
        per_frame: tokens of a frame.
        words: tokens of the text, which stands behind the frames.
    """

    def __init__(self, network: VideoLanguageModel, per_frame: float, words: int):
        self._weights = weigh(network.llm.blocks(), flows=False)
        self._per_frame, self._words = per_frame, words

    def of_rows(self, orders: Iterable[Int[Tensor, " t"]], sharing: bool) -> int:
        """Returns the FLOPs of all rows; `sharing`: without what the row before begins with."""
        before, flops = torch.zeros(0, dtype=torch.long), 0
        for order in orders:
            known = _common(before, order) if sharing else 0
            length = round(len(order) * self._per_frame) + self._words
            flops += self._from(round(known * self._per_frame), length)
            before = order
        return flops

    def _from(self, start: int, stop: int) -> int:
        """Returns the FLOPs of the tokens from `start` on. Masked pairs of a chunk count too."""
        ends = [*range(start + CHUNK_TOKENS, stop, CHUNK_TOKENS), stop]
        starts: Sequence[int] = [start, *ends[:-1]]
        pairs = zip(starts, ends, strict=True)
        return sum(self._weights.flops(end - at, end, backward=False) for at, end in pairs)


def _common(a: Tensor, b: Tensor) -> int:
    """Returns the number of frames that two rows begin with."""
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
