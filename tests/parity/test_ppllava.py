"""PPLLaVA's encoder, relevance and pooled tokens, number by number."""

import torch

from datamodules.batch import Grid
from lightning_modules.pooler.relevance import relevance

from .ppllava_weights import build_stages


def assert_near(ours, published):
    torch.testing.assert_close(ours, published, atol=1e-4, rtol=0)


@torch.no_grad()
def test_stages(ppllava_golden):
    spec, tensors = ppllava_golden.spec, ppllava_golden.tensors
    encoder, pooler, projector = build_stages(spec, ppllava_golden.weights())
    assert encoder.grid == tuple(spec["frame_shape"])
    assert spec["cases"]
    for i, case in enumerate(spec["cases"]):
        golden = {
            name.removeprefix(f"case{i}/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"case{i}/")
        }
        frames = golden["pixel_values"].flatten(0, 1)
        features = encoder.hidden_state(frames, [case["frames"]])
        assert_near(features, golden["vision_features"])

        prompt_mask = golden["clip_attention_mask"].bool()
        prompt = encoder.encode_prompt(golden["clip_input_ids"], prompt_mask)
        assert_near(prompt, golden["text_embeds"])

        patches = features[:, 1:]
        grid = Grid(case["frames"], *encoder.grid)
        score = relevance(encoder.align(patches), prompt[0]).view(grid)
        assert_near(score, golden["relevance"][0])

        tokens = projector.contract(pooler(patches.unflatten(1, grid[1:]), score, projector.expand))
        assert tokens.shape[:3] == pooler.grid(grid)
        assert_near(tokens.flatten(0, 2), golden["pooled_tokens"][0])
