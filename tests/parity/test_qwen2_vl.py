"""VideoRoPE whole: patches, features, positions, logits and generated tokens of the published code.

`tests/golden/videorope/README.md` describes the cases. It allows 1e-4.
"""

import pytest
import torch
from einops import rearrange

from datamodules.batch import Visual
from lightning_modules.encoder.native.patches import PatchSizes, Steps, cut_patches
from lightning_modules.encoder.native.qwen2_5_vl import Qwen2_5VLEncoder
from lightning_modules.projector import Projector
from tests.helpers.qwen_vl import WORDS, batch_of, model_of, visual_of

PATCHES = PatchSizes(frames=2, side=14, merge=2)


def near(ours, theirs, allowed=1e-4):
    torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)


def projected(model, visuals):
    return [
        model.projector.contract(model.projector.expand(tokens.features))
        for tokens in model.encoder(visuals)
    ]


def test_patches(videorope_golden):
    compared = 0
    for name, visual in videorope_golden.spec["visuals"].items():
        if visual["pixel_values_stored"]:
            frames = visual_of(videorope_golden, name).frames
            found = cut_patches(frames, Steps(0, 0, visual["llm_grid"][0]), PATCHES)
            near(found, videorope_golden.tensors[f"visuals/{name}/pixel_values"], 1e-6)
            compared += 1
    assert compared


@torch.no_grad()
@pytest.mark.parametrize("chunk_frames", [None, 2])
def test_features(videorope_golden, chunk_frames):
    names = list(videorope_golden.spec["visuals"])
    visuals = [visual_of(videorope_golden, name) for name in names]
    for model_name in videorope_golden.spec["models"]:
        model = model_of(videorope_golden, model_name, "videorope")
        model.encoder.chunk_frames = chunk_frames
        for name, visual in zip(names, visuals, strict=True):
            t, _, height, width = visual.frames.shape
            grid = videorope_golden.spec["visuals"][name]["llm_grid"]
            assert list(model.encoder.extent(t, height, width)) == grid
        alone = [projected(model, [visual])[0] for visual in visuals]
        together = projected(model, visuals)
        for name, one, other in zip(names, alone, together, strict=True):
            golden = videorope_golden.tensors[f"visuals/{name}/features/{model_name}"]
            near(one, golden)
            near(other, golden)


@pytest.mark.parametrize("scheme", WORDS)
@torch.no_grad()
def test_positions_and_logits(videorope_golden, scheme):
    for i, case in enumerate(videorope_golden.spec["cases"]):
        golden = {
            name: videorope_golden.tensors[f"case{i}/{scheme}/{name}"]
            for name in ("position_ids", "logits")
        }
        model = model_of(videorope_golden, case["model"], scheme)
        batch = batch_of(videorope_golden, i)
        encoded = model.encoder(batch.visuals)
        inputs = model.compose(batch, encoded, padding_side=case["padding"] or "right")
        real = videorope_golden.tensors[f"case{i}/attention_mask"].bool()
        assert torch.equal(inputs.mask, real)
        positions = inputs.positions[1:] * model.rotary.text_step
        expected = golden["position_ids"]
        assert torch.equal(positions.expand_as(expected)[:, real], expected[:, real])
        if case["padding"] is None:
            near(inputs.embeds, videorope_golden.tensors[f"case{i}/inputs_embeds"])
        logits = model.llm.head(model.llm(inputs.embeds, inputs.mask, inputs.positions))
        near(logits[real], golden["logits"][real])


@pytest.mark.parametrize("scheme", WORDS)
def test_generated_tokens(videorope_golden, scheme):
    compared = 0
    for i, case in enumerate(videorope_golden.spec["cases"]):
        if not case["generated"]:
            continue
        cases = [i]
        if "decode_too_far_by" in case["schemes"][scheme]:
            # Padded TAD-RoPE decodes too far in the published code: see the README.
            cases = case["same_rows_as"]
        expected = [videorope_golden.tensors[f"case{n}/{scheme}/generated"] for n in cases]
        model = model_of(videorope_golden, case["model"], scheme)
        found = model.generate(
            batch_of(videorope_golden, i),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(found, torch.cat(expected))
        compared += 1
    assert compared


@pytest.mark.parametrize("chunk_frames", [None, 2])
@torch.no_grad()
def test_features_of_qwen2_5(videorope_golden, chunk_frames):
    """Golden patches are put together to frames, which are normalised already."""
    spec = videorope_golden.spec["qwen2_5_vision"]
    tensors, prefix = videorope_golden.tensors, "qwen2_5_vision/weights/"
    encoder = Qwen2_5VLEncoder(config=spec["config"], chunk_frames=chunk_frames).eval()
    projector = Projector(encoder.width, spec["config"]["out_hidden_size"], encoder.width)
    weights = {n.removeprefix(prefix): v.float() for n, v in tensors.items() if prefix in n}
    for number, linear in enumerate((projector.linear_1, projector.linear_2)):
        names = ("weight", "bias")
        parts = {name: weights.pop(f"merger.mlp.{2 * number}.{name}") for name in names}
        linear.load_state_dict(parts)
    encoder.tower.load_state_dict(weights)
    side = spec["config"]["patch_size"]
    for number, run in enumerate(spec["runs"]):
        visuals = []
        for grid in run["grids"]:
            _, height, width = spec["grids"][grid]
            frames = rearrange(
                tensors[f"qwen2_5_vision/pixel_values{grid}"],
                "(t h w m n) (c f a b) -> (t f) c (h m a) (w n b)",
                h=height // 2,
                w=width // 2,
                m=2,
                n=2,
                f=2,
                a=side,
                b=side,
            )
            visuals.append(Visual(frames))
        found = [projector.contract(projector.expand(t.features)) for t in encoder(visuals)]
        near(torch.cat(found), tensors[f"qwen2_5_vision/run{number}/features"])
