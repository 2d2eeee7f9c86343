"""PPLLaVA's published layout, tiny: after the import, its logits equal those of its own code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig

from datamodules.batch import VISUAL_SLOT
from tests.helpers.published import assert_near, imported, make_batch, run

GOLDEN = Path(__file__).parents[2] / "golden" / "ppllava"


def write_ppllava(name, folder):
    """Writes a golden pair's weights like the published checkpoint, and the config of its CLIP."""
    spec = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    CLIPConfig(
        text_config=spec["clip_text"],
        vision_config=spec["clip_vision"],
        projection_dim=spec["projection_dim"],
    ).save_pretrained(folder / "clip")
    config = {
        "architectures": ["LlavaInterleaveForConditionalGeneration"],
        "model_type": "llava_next",
        "vision_config": {
            **spec["clip_vision"],
            "model_type": "clip_vision_model",
            "depth": spec["bt_adapter_depth"],
            "max_T": spec["max_T"],
        },
        "text_config": {**spec["llm"], "model_type": "llama"},
        "vision_feature_layer": spec["vision_feature_layer"],
        "image_token_index": spec["image_token_index"],
        "qwen": False,
        "pooling": "ppllava",
        "clip_weight": str(folder / "clip"),
        "clip_post_pretrain": None,
        "btadapter": spec["bt_adapter"],
        "btadapter_depth": spec["bt_adapter_depth"],
        "max_T": spec["max_T"],
        "extend_clip": spec["extended_context"],
        "pooling_temp": spec["temperature"],
        "pooling_kernel": spec["pooling_kernel"],
        "pooling_stride": spec["pooling_stride"],
        "image_pooling_kernel": spec["image_pooling_kernel"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    return spec, tensors, weights


@pytest.mark.parametrize("stored", ["shards", "bin"])
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
@torch.no_grad()
def test_ppllava_gives_its_golden_logits(name, stored, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    spec, golden, weights = write_ppllava(name, source)
    if stored == "bin":
        torch.save(weights, source / "pytorch_model.bin")
    else:
        placed = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(weights))}
        for file in set(placed.values()):
            save_file({k: v for k, v in weights.items() if placed[k] == file}, source / file)
        index = json.dumps({"weight_map": placed})
        (source / "model.safetensors.index.json").write_text(index)
    model = imported(source, tmp_path / "out")
    assert (model.encoder.adapter is not None) == spec["bt_adapter"]
    for i in range(len(spec["cases"])):
        case = {k.removeprefix(f"case{i}/"): v for k, v in golden.items() if f"case{i}/" in k}
        ids, frames = case["input_ids"], case["pixel_values"].flatten(0, 1)
        read = torch.where(ids == spec["image_token_index"], VISUAL_SLOT, ids)
        batch = replace(
            make_batch(read[0].tolist(), frames, [len(frames)]),
            prompt_ids=case["clip_input_ids"],
            prompt_mask=case["clip_attention_mask"].bool(),
        )
        assert_near(model.llm.head(model(batch).hidden), case["logits"])


def test_ppllava_says_which_clip_it_misses(tmp_path, capsys):
    write_ppllava("public", tmp_path)
    clip = tmp_path / "clip"
    clip.rename(tmp_path / "elsewhere")
    code, error = run(tmp_path, tmp_path / "out", capsys=capsys)
    assert code == 2
    assert str(clip) in error
    assert "--clip" in error
