"""LLaVA-NeXT's any-resolution images: transformers' pixels and logits, from one tiny model."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from datamodules.batch import (
    IGNORE_INDEX,
    VISUAL_SLOT,
    Grid,
    VideoBatch,
    Visual,
    VisualInfo,
    pad_rows,
    visual_fields,
)
from datamodules.visuals.tiles import best_grid, cut_tiles
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.splice.tiles import split_tiles
from tests.helpers.visuals import outline, row_of

SIDE, IMAGE_TOKEN = 32, 60
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]
HEADS = {"num_attention_heads": 2}
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, **HEADS}
VISION |= {"image_size": SIDE, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **HEADS}
TEXT |= {"vocab_size": 64, "num_key_value_heads": 1, "initializer_range": 0.2}

#: Width, height: portrait, landscape, square, the same shape as the grids, tiny, odd, and thin.
SIZES = [(40, 100), (150, 60), (64, 64), (32, 96), (5, 3), (33, 97), (100, 22), (21, 20), (1, 1)]


def picture(size, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor():
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )


def test_grids_are_chosen_as_published():
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(20), np.log(4000), (400, 2))).astype(int).tolist()
    for side, (height, width) in [(s, size) for s in (32, 336) for size in sizes]:
        pinpoints = [[rows * side, columns * side] for rows, columns in GRIDS]
        published = select_best_resolution((height, width), pinpoints)
        if published is None:  # thinner than a pixel in every grid
            continue
        rows, columns = best_grid(height, width, side, GRIDS)
        assert (rows * side, columns * side) == published, (height, width)
        patches = image_size_to_num_patches((height, width), pinpoints, side)
        assert patches == 1 + rows * columns


def test_pixels_are_the_published_ones(processor):
    rng = np.random.default_rng(1)
    for number in range(60):
        size = tuple(int(n) for n in rng.integers(8, 260, 2))
        image = picture(size, number)
        frames, tiles = cut_tiles(image, SIDE, GRIDS)
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        published = processor(image, **options)
        assert torch.equal(frames.float(), published["pixel_values"][0].float()), size
        assert published["image_sizes"][0].tolist() == [tiles.height, tiles.width]


@pytest.fixture(scope="module")
def models():
    """Returns transformers' model, and ours with its weights."""
    torch.manual_seed(0)
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=PINPOINTS,
        )
    ).eval()
    torch.nn.init.normal_(theirs.model.image_newline)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **HEADS}
    stages = "lightning_modules"
    ours = VideoLanguageModel(
        VideoLanguageModelConfig(
            encoder={
                "_target_": f"{stages}.encoder.clip.ClipEncoder",
                "config": {"vision": VISION, "text": text, "projection_dim": 8},
                "context_length": None,
            },
            pooler={"_target_": f"{stages}.pooler.identity.IdentityPooler"},
            rotary={"_target_": f"{stages}.rotary.vanilla.VanillaRope"},
            llm={
                "_target_": f"{stages}.llm.causal_lm.CausalLM",
                "config": {"model_type": "llama", **TEXT},
            },
            tiles={"newline": True},
        )
    ).eval()
    copy_weights(theirs, ours)
    return theirs, ours


@torch.no_grad()
def copy_weights(theirs, ours):
    tower = theirs.model.vision_tower.state_dict()
    left = ours.encoder.vision.load_state_dict(tower, strict=False)
    assert not left.missing_keys
    assert all(name.startswith("encoder.layers.2.") for name in left.unexpected_keys)
    ours.projector.load_state_dict(theirs.model.multi_modal_projector.state_dict())
    ours.image_newline.copy_(theirs.model.image_newline)
    ours.llm.lm.model.load_state_dict(theirs.model.language_model.state_dict())
    ours.llm.lm.lm_head.load_state_dict(theirs.lm_head.state_dict())


def published_logits(model, processor, rows, images):
    """Returns logits of each row without its padding. A slot stands for one image."""
    features = []
    inputs = {}
    if images:
        inputs = dict(processor(images, return_tensors="pt"))
        features = model.model.get_image_features(**inputs).pooler_output
    lengths = iter([len(feature) for feature in features])
    ids = [
        [token for id in row for token in ([IMAGE_TOKEN] * next(lengths) if id < 0 else [id])]
        for row in rows
    ]
    mask = pad_rows([[1] * len(row) for row in ids], 0)
    logits = model(input_ids=pad_rows(ids, 0), attention_mask=mask, **inputs).logits
    return [row[: len(own)] for row, own in zip(logits, ids, strict=True)]


def make_batch(rows, images):
    cut = [cut_tiles(image, SIDE, GRIDS) for image in images]
    visuals = [Visual(frames, VisualInfo(tiles=tiles)) for frames, tiles in cut]
    return VideoBatch(
        input_ids=pad_rows(rows, 0),
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        labels=pad_rows([[IGNORE_INDEX] * len(row) for row in rows], IGNORE_INDEX),
        **visual_fields(visuals),
        prompt_ids=torch.ones(len(rows), 2, dtype=torch.long),
        prompt_mask=torch.ones(len(rows), 2, dtype=torch.bool),
        keys=[str(n) for n in range(len(rows))],
    )


def assert_same(models, processor, rows, sizes):
    theirs, ours = models
    images = [picture(size, seed) for seed, size in enumerate(sizes)]
    published = published_logits(theirs, processor, rows, images)
    batch = make_batch(rows, images)
    inputs = ours.compose(batch, ours.encoder(split_tiles(batch.visuals)))
    logits = ours.llm.head(ours.llm(inputs.embeds, inputs.mask, inputs.positions))
    for row, mask, expected in zip(logits, inputs.mask, published, strict=True):
        torch.testing.assert_close(row[mask], expected, atol=1e-4, rtol=0)


S = VISUAL_SLOT


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_logits_of_one_image(models, processor, size):
    assert_same(models, processor, [[1, 2, S, 3, 4]], [size])


@torch.no_grad()
def test_logits_of_several_images_in_a_text(models, processor):
    assert_same(models, processor, [[S, 1, S, S, 2, 3, S, 4]], SIZES[:4])


@torch.no_grad()
def test_logits_of_a_mixed_batch(models, processor):
    """Only text, one image, several images: rows of very different lengths."""
    rows = [[1, 2, 3, 4, 5], [6, S, 7, 8], [S, S, 9, 10, S, 11], [S, 12]]
    assert_same(models, processor, rows, SIZES[:5])


@torch.no_grad()
def test_of_a_thin_picture_a_row_is_left(models, processor):
    """Ours differs from the published layout only here, which keeps no row of this plane."""
    theirs, ours = models
    image = picture((300, 22))
    published = published_logits(theirs, processor, [[1, S, 2]], [image])
    batch = make_batch([[1, S, 2]], [image])
    row = ours.compose(batch, ours.encoder(split_tiles(batch.visuals))).segments[0]
    assert len(published[0]) == 1 + 16 + 1
    assert outline(row) == outline(row_of(1, Grid(1, 4, 4), Grid(1, 2, 13), 1))
