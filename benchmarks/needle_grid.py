"""Benchmarks V-NIAH's grid with a cached prefix of the haystack, against reading each cell anew.

Uses the demo's tiny model with random weights, and 12 needles at 6 depths of a haystack of 192
frames without distractors. Such rows are short and share much. With distractors, and against
VideoRoPE's published loop, the cached prefix is slower (0.80 x) and takes four times the memory.

The frames are encoded once for both ways, before the clock starts. Both ways pool and project them
(a fifth of the baseline's time here).
"""

from collections.abc import Sequence

import torch
from harness import Row, at_most, compare, table
from hydra import compose, initialize_config_dir
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VideoBatch, Visual
from datamodules.haystack.cells import GridPlan, NeedleGrid, NeedleRow
from datamodules.haystack.needle import Needle
from datamodules.instruct import Sample, collate
from datamodules.sample.conversation import ConversationEncoder, Turn
from experiments import CONFIG_DIR, launcher  # noqa: F401 - Hydra knows its resolvers
from experiments.run.compose import plain
from lightning_modules.metrics.needle.prefix import PrefixCache, first_predicting
from lightning_modules.model import LanguageInputs, VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.tokens import VisualTokens

PLAN = GridPlan(frames=[192], depths=[0.0, 0.2, 0.4, 0.6, 0.8, 1.0], needles=12)
COLOURS, SIDE = ("red", "green", "blue", "grey"), 64


def demo_model() -> VideoLanguageModel:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("train", ["experiment=vniah_d_tiny"])
    return VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).eval()


def needle_rows() -> tuple[list[NeedleRow], Tensor]:
    """Returns the rows without distractors, and the frames that they show."""
    encode_turns = ConversationEncoder()

    def pictures(count: int) -> Tensor:
        return torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8)

    def encode(needles: Sequence[Needle], frames: int) -> VideoBatch:
        stand_in = torch.zeros(frames, 3, 1, 1, dtype=torch.uint8)
        asked = [
            [Turn("user", f"<video>\n{n.question}"), Turn("assistant", n.answer)] for n in needles
        ]
        samples = [Sample("", encode_turns(turns), [Visual(stand_in)]) for turns in asked]
        return collate(samples, pad_id=0, prompt_pad_id=0)

    needles = [
        Needle(pictures(1)[0], f"Which digit is on the {colour} card?", f"{colour} {n}", "")
        for n, colour in enumerate(COLOURS * (PLAN.needles // len(COLOURS)))
    ]
    grid = NeedleGrid([pictures(max(PLAN.frames))], needles, PLAN, encode)
    rows = [grid[i] for i in range(len(grid))]
    return [row for row in rows if row.condition == "plain"], grid.bank


def score(
    model: VideoLanguageModel, inputs: LanguageInputs, hidden: Tensor, start: int
) -> list[Tensor]:
    """Returns, at each answer token, the predicted token and the answer's log-probability."""
    targets = inputs.labels[:, start + 1 :]
    labelled = targets != IGNORE_INDEX
    log_probs = model.llm.head(hidden[:, :-1][labelled]).log_softmax(-1)
    return [log_probs.argmax(-1), log_probs.gather(1, targets[labelled][:, None])]


@torch.no_grad()
def run() -> list[Row]:
    torch.manual_seed(0)
    model = demo_model()
    rows, bank = needle_rows()
    patches = model.encoder([Visual(bank)])[0].as_grid()  # n h w d
    counts = {}

    def encoded(row: NeedleRow) -> list[VisualTokens]:
        return [VisualTokens.on_grid(patches[order]) for order in row.order]

    def ours() -> list[Tensor]:
        prefixes, results = PrefixCache(model), []
        for row in rows:
            inputs = model.compose(row.text, encoded(row))
            start = first_predicting(inputs.labels)
            results += score(model, inputs, prefixes.hidden(inputs, start), start)
        counts.update(ours=prefixes.computed)
        return results

    def baseline() -> list[Tensor]:
        results, counts["baseline"] = [], 0
        for row in rows:
            inputs = model.compose(row.text, encoded(row))
            hidden = model.llm(inputs.embeds, inputs.mask, inputs.positions)
            results += score(model, inputs, hidden, 0)
            counts["baseline"] += int(inputs.mask.sum())
        return results

    name = "needle test, short rows without distractors"
    speed = compare(f"{name}, same answers", ours, baseline, at_least=1.2, repeats=4)
    tokens = at_most(f"{name}, token forwards", **counts, share=0.55, unit="tokens")
    return [speed, tokens]


if __name__ == "__main__":
    print(table(run()))
