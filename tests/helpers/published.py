"""Tiny random models in published layouts, and helpers to compare them with their import."""

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from datamodules.batch import VideoBatch
from experiments import import_weights
from lightning_modules.model import VideoLanguageModel
from tests.helpers.visuals import frames_of

IMAGE = 49
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Converts parameter names from `save_pretrained` of transformers 5.x to other layouts.
LAYOUTS = {
    "written": lambda name: name,
    "hub": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "in_memory": lambda name: (
        name.removeprefix("language_model.")
        if "lm_head" in name
        else f"model.{name.replace('language_model.model.', 'language_model.')}"
    ),
}


def randomise(model):
    """Fills a model with random values that are large enough to show a wrong one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def make_llava_next():
    config = LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
    )
    return randomise(LlavaNextForConditionalGeneration(config))


def make_llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": True},
        image_token_index=IMAGE,
        video_token_index=48,
    )
    return randomise(LlavaOnevisionForConditionalGeneration(config))


def write(model, folder, layout="written"):
    model.save_pretrained(folder)
    rename(folder, LAYOUTS[layout])
    return folder


def rename(folder, function):
    path = folder / "model.safetensors"
    save_file({function(name): value for name, value in load_file(path).items()}, path)


def run(*words, capsys=None):
    code = import_weights.main([str(word) for word in words])
    error = capsys.readouterr().err if capsys else ""
    return code, error


def imported(source, out, *words):
    assert import_weights.main([str(source), str(out), *words]) == 0
    return VideoLanguageModel.from_pretrained(out).eval()


def make_batch(ids, frames, counts):
    ids = torch.tensor([ids])
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=ids,
        **frames_of(frames, counts),
        prompt_ids=torch.zeros(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        keys=["one"],
    )


def assert_near(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
