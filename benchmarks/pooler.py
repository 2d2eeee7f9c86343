"""Benchmarks PPLLaVA's pooler with its projector.

Ours applies the second linear after pooling, in chunks, and does not unfold windows. The baseline
projects every patch by both linears and unfolds the windows, as the published code does
(ppllava/models/llava_projector.py). The size is real: 32 x 24 x 24 patches of width 1024 become
1024 tokens of width 4096.
"""

import torch
from harness import Row, at_most, compare, peak_memory, table
from torch import Tensor

from datamodules.batch import Grid
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.projector import Projector
from lightning_modules.tokens import VisualTokens

BEFORE, KERNEL = Grid(32, 24, 24), Grid(2, 3, 3)


def long_way(
    pooler: PromptGuidedPooler, projector: Projector, patches: Tensor, score: Tensor
) -> Tensor:
    scores = score.float() * pooler.logit_scale.float().exp()
    wide = projector.contract(projector.expand(patches)).permute(3, 0, 1, 2)  # m t h w
    for axis, size in enumerate(pooler.fit(Grid(*score.shape)).kernel):
        wide = wide.unfold(axis + 1, size, size)
        scores = scores.unfold(axis, size, size)
    windows = wide.contiguous().flatten(4)  # m t2 h2 w2 window
    weights = (scores.flatten(3) / pooler.temperature).softmax(-1).to(windows.dtype)
    return (windows * weights).sum(-1).permute(1, 2, 3, 0)


@torch.no_grad()
def run() -> list[Row]:
    torch.manual_seed(0)
    pooler, projector = PromptGuidedPooler(kernel=KERNEL), Projector(1024, 4096)
    patches, score = torch.randn(*BEFORE, 1024), torch.rand(BEFORE) * 0.05
    tokens = VisualTokens.on_grid(patches)

    def ours() -> Tensor:
        return projector.contract(pooler(tokens, score.flatten(), projector.expand).as_grid())

    def baseline() -> Tensor:
        return long_way(pooler, projector, patches, score)

    speed = compare("pooler with projector", ours, baseline, at_least=4, repeats=2)
    memory = [peak_memory(way) / 2**20 for way in (ours, baseline)]
    return [speed, at_most("pooler with projector, peak memory", *memory, share=0.25, unit="MiB")]


if __name__ == "__main__":
    print(table(run()))
