"""Makes a tiny model for tiled images, and a batch with every kind of visual."""

from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import OmegaConf

from datamodules.batch import (
    IGNORE_INDEX,
    VISUAL_SLOT,
    Tiles,
    VideoBatch,
    pad_rows,
    visual_fields,
)
from experiments import CONFIG_DIR
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from tests.helpers.visuals import frames_of

ROTARY = sorted(path.stem for path in (CONFIG_DIR / "rotary").glob("*.yaml"))
POOLERS = {
    "average": {"_target_": "lightning_modules.pooler.average.AveragePooler", "kernel": [2, 2, 2]},
    "prompt_guided": {
        "_target_": "lightning_modules.pooler.prompt_guided.PromptGuidedPooler",
        "kernel": [2, 2, 2],
    },
    "none": {"_target_": "lightning_modules.pooler.identity.IdentityPooler"},
}
HEADS = {"num_attention_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, **HEADS}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **HEADS}
TEXT |= {"vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58}
LLM = {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
LLM |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.2, **HEADS}

S = VISUAL_SLOT
WIDE, TALL = Tiles(1, 2, 20, 50), Tiles(2, 1, 90, 40)
#: In order: one image, several images, a tiled image, a video, text alone, a video between images,
#: and a video between tiled images.
ROWS = [
    [S, 1, 2, 3],
    [1, S, 2, S, S, 3, 4, 5],
    [6, S, 7, 8, 9],
    [S, 10, 11, 12, 13, 14],
    [15, 16, 17],
    [18, S, 19, S, 20, S, 21, 26],
    [S, 22, S, 23, S, 24, 25],
]
FRAMES = [1, 1, 1, 1, 3, 4, 1, 6, 1, 3, 2, 3]
TILES = [None, None, None, None, WIDE, None, None, None, None, TALL, None, WIDE]


def make_tiled_model(
    rotary: str = "videorope",
    pooler: str = "average",
    newline: bool = True,
    **options: Any,
) -> VideoLanguageModel:
    torch.manual_seed(0)
    encoder = {
        "_target_": "lightning_modules.encoder.clip.ClipEncoder",
        "config": {"vision": VISION, "text": TEXT, "projection_dim": 8},
        "context_length": None,
        "bt_adapter": options.get("bt_adapter"),
    }
    config = VideoLanguageModelConfig(
        encoder=encoder,
        pooler=POOLERS[pooler],
        rotary=OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"rotary/{rotary}.yaml")),
        llm={"_target_": "lightning_modules.llm.causal_lm.CausalLM", "config": LLM},
        tiles=options.get("tiles", {"newline": newline}),
        positions=options.get("positions", "reindex"),
    )
    return VideoLanguageModel(config).eval()


def mixed_batch() -> VideoBatch:
    """Returns a batch of `ROWS`. The last two tokens of each row are its answer."""
    torch.manual_seed(1)
    prompts = torch.randint(0, 57, (len(ROWS), 6))
    prompts[:, -1] = 59
    return VideoBatch(
        input_ids=pad_rows(ROWS, 0),
        attention_mask=pad_rows([[1] * len(row) for row in ROWS], 0).bool(),
        labels=pad_rows([[IGNORE_INDEX] * (len(row) - 2) + row[-2:] for row in ROWS], IGNORE_INDEX),
        **frames_of(
            torch.randint(0, 256, (sum(FRAMES), 3, 32, 32), dtype=torch.uint8), FRAMES, TILES
        ),
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        keys=[str(n) for n in range(len(ROWS))],
    )


def rows_of(batch: VideoBatch) -> Iterator[VideoBatch]:
    """Yields the same samples as batches of one, without padding."""
    visual = 0
    for i, mask in enumerate(batch.attention_mask):
        mine = slice(visual, visual := visual + int((batch.input_ids[i] == S).sum()))
        yield VideoBatch(
            input_ids=batch.input_ids[i, mask][None],
            attention_mask=mask[mask][None],
            labels=batch.labels[i, mask][None],
            **visual_fields(batch.visuals[mine]),
            prompt_ids=batch.prompt_ids[i : i + 1],
            prompt_mask=batch.prompt_mask[i : i + 1],
            keys=batch.keys[i : i + 1],
        )
