"""PPLLaVA's encoder, relevance and pooled tokens, number by number."""

import torch

from datamodules.batch import VISUAL_SLOT, Grid, VideoBatch, Visual
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.pooler.base import Pooler
from tests.helpers.visuals import frames_of

from .ppllava_weights import (
    build_stages,
    encoder_arguments,
    encoder_weights,
    llm_weights,
    pooler_arguments,
    pooler_weights,
    projector_weights,
)


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
        (tokens,) = encoder([Visual(frames)])
        assert torch.equal(tokens.features, patches.flatten(0, 1))
        score = Pooler.relevance(encoder.align(tokens.features), prompt[0])
        assert_near(score.view(grid), golden["relevance"][0])

        pooled = pooler(tokens, score, projector.expand)
        assert pooled.grid == pooler.extent(grid)
        assert_near(projector.contract(pooled.features), golden["pooled_tokens"][0])


def build_model(spec, weights):
    """The whole pipeline with the sizes and weights of one golden pair."""
    llm = {key: value for key, value in spec["llm"].items() if key != "rope_theta"}
    theta = {"rope_type": "default", "rope_theta": spec["llm"]["rope_theta"]}
    stages = "lightning_modules"
    config = VideoLanguageModelConfig(
        encoder={"_target_": f"{stages}.encoder.clip.ClipEncoder", **encoder_arguments(spec)},
        pooler={
            "_target_": f"{stages}.pooler.prompt_guided.PromptGuidedPooler",
            **pooler_arguments(spec),
        },
        rotary={"_target_": f"{stages}.rotary.vanilla.VanillaRope"},
        llm={
            "_target_": f"{stages}.llm.causal_lm.CausalLM",
            "config": {"model_type": "llama", "rope_parameters": theta, **llm},
        },
    )
    model = VideoLanguageModel(config)
    model.encoder.load_state_dict(encoder_weights(weights, model.encoder))
    model.pooler.load_state_dict(pooler_weights(weights))
    model.projector.load_state_dict(projector_weights(weights))
    model.llm.lm.load_state_dict(llm_weights(weights))
    return model.eval()


@torch.no_grad()
def test_logits(ppllava_golden):
    spec, tensors = ppllava_golden.spec, ppllava_golden.tensors
    model = build_model(spec, ppllava_golden.weights())
    for i, case in enumerate(spec["cases"]):
        ids = tensors[f"case{i}/input_ids"]
        batch = VideoBatch(
            input_ids=torch.where(ids == spec["image_token_index"], VISUAL_SLOT, ids),
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            labels=ids,
            **frames_of(tensors[f"case{i}/pixel_values"].flatten(0, 1), [case["frames"]]),
            prompt_ids=tensors[f"case{i}/clip_input_ids"],
            prompt_mask=tensors[f"case{i}/clip_attention_mask"].bool(),
            keys=[ppllava_golden.name],
        )
        assert_near(model.llm.head(model(batch).hidden), tensors[f"case{i}/logits"])
