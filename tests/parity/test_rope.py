"""The four schemes of VideoRoPE's repository: exact positions, logits within 1e-5."""

import pytest
import torch

from datamodules.batch import Grid
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.mrope import MRope
from lightning_modules.rotary.tad import TadRope
from lightning_modules.rotary.vanilla import VanillaRope
from lightning_modules.rotary.videorope import VideoRope
from tests.helpers.visuals import row_of

SCHEMES = {
    "vanilla_rope": lambda sections: VanillaRope(),
    "tad_rope": lambda sections: TadRope(),
    "m_rope": MRope,
    "videorope": lambda sections: VideoRope(sections=sections),
}


def read_layout(segments):
    """`["text", n]`, `["image", h, w]` or `["video", t, h, w]` -> number or layout."""
    kinds = {"text": lambda n: n, "image": lambda h, w: Grid(1, h, w), "video": Grid}
    return row_of(*(kinds[kind](*sizes) for kind, *sizes in segments))


def build_llm(golden, scheme):
    config = dict(golden.spec["config"])
    assert config.pop("architecture").startswith("Qwen2 ")
    theta = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config.pop("mrope_section")
    fields = {"model_type": "qwen2", "tie_word_embeddings": False, "rope_parameters": theta}
    llm = CausalLM(config={**fields, **config}).eval()
    llm.lm.load_state_dict(golden.weights())
    llm.replace_rotary(lambda original: RotaryEmbedding(scheme, original))
    return llm


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_positions_and_logits(rope_golden, name):
    scheme = SCHEMES[name](rope_golden.spec["config"]["mrope_section"])
    llm = build_llm(rope_golden, scheme)
    assert rope_golden.spec["cases"]
    for i, case in enumerate(rope_golden.spec["cases"]):
        golden = {
            key: rope_golden.tensors[f"case{i}/{name}/{key}"] for key in ("position_ids", "logits")
        }
        layout = read_layout(case["segments"])
        positions = scheme.positions(layout)[0].expand(3, -1)
        torch.testing.assert_close(positions[:, None], golden["position_ids"], atol=0, rtol=0)

        embeds = rope_golden.tensors[f"case{i}/inputs_embeds"]
        everything = torch.ones(embeds.shape[:2], dtype=torch.bool)
        for mask in (None, everything):
            logits = llm.head(llm(embeds, mask, scheme.batch_positions([layout])))
            torch.testing.assert_close(logits, golden["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_first_generated_position(rope_golden, name):
    """The published code generates from text_step * length + rope_delta on."""
    scheme = SCHEMES[name](rope_golden.spec["config"]["mrope_section"])
    for case in rope_golden.spec["cases"]:
        layout = read_layout(case["segments"])
        length = sum(s if isinstance(s, int) else len(s) for s in layout)
        _, after = scheme.positions(layout)
        assert after == scheme.text_step * length + case["schemes"][name]["rope_delta"]
