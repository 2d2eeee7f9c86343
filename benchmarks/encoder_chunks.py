"""Benchmarks an encoder that runs frames in chunks, against one that takes all frames at once.

Encodes 512 frames of 336 pixels without gradients. The tower has CLIP's architecture but is small
(36 patches of width 96, three layers), so that the frames fill the memory, as in an hour of video.
All at once, there are two float32 copies of them.
"""

import torch
from harness import Row, at_most, compare, peak_memory, table
from torch import Tensor

from lightning_modules.encoder.clip_vision import ClipVisionEncoder

FRAMES = 512
VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 336,
    "patch_size": 56,
}


@torch.no_grad()
def run() -> list[Row]:
    torch.manual_seed(0)
    encoder = ClipVisionEncoder({"vision": VISION}).eval()
    whole = ClipVisionEncoder({"vision": VISION}, chunk_frames=None).eval()
    whole.load_state_dict(encoder.state_dict())
    frames = torch.randint(0, 256, (FRAMES, 3, 336, 336), dtype=torch.uint8)

    def ours() -> Tensor:
        return encoder.encode(frames, [FRAMES])

    def baseline() -> Tensor:
        return whole.encode(frames, [FRAMES])

    name = f"encoder, {FRAMES} frames in chunks of {encoder.chunk_frames}"
    speed = compare(name, ours, baseline, at_least=1.0)
    memory = [peak_memory(way) / 2**20 for way in (ours, baseline)]
    return [speed, at_most(f"{name}, peak memory", *memory, share=0.1, unit="MiB")]


if __name__ == "__main__":
    print(table(run()))
