"""Training of CLIP's text context: its network, its loss, and its trained parameters."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from datamodules.batch import visual_fields
from lightning_modules.encoder.clip import normalise
from lightning_modules.training.contrast import ContrastiveClip, contrast
from tests.helpers.tiny_clip import make_batch

TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ENCODER = {"_target_": "lightning_modules.encoder.clip.ClipEncoder"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Returns a CLIP model, and a folder with it as on the hub."""
    torch.manual_seed(7)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model.eval(), str(folder)


def from_source(folder, **arguments):
    spec = ENCODER | {"source": folder, "feature_layer": -1} | arguments
    return ContrastiveClip(spec, temperature=math.exp(-2.6592))


# The network


def test_images_and_captions_are_compared_as_clip_compares_them(clip):
    """At CLIP's own 77 positions, the loss is CLIP's as well."""
    model, folder = clip
    batch = make_batch(range(6), counts=[1])
    network = from_source(folder, context_length=None).eval()
    with torch.no_grad():
        pairs = network(batch)
        pixels = normalise(torch.cat([visual.frames for visual in batch.visuals]))
        ids, mask = batch.prompt_ids, batch.prompt_mask.long()
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
    logits = pairs.scale * pairs.visuals @ pairs.captions.T
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-4, rtol=1e-4)
    loss = contrast(pairs, pairs.visuals, pairs.captions, rank=0)
    torch.testing.assert_close(loss / 6, expected.loss, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1, "all pairs look alike, so that nothing was compared"


def test_a_video_is_the_mean_of_its_frames(clip):
    network = from_source(clip[1], context_length=None).eval()
    batch = make_batch(range(4), counts=[2])
    with torch.no_grad():
        pairs = network(batch)
        tokens = network.encoder.hidden_state(*network.encoder.stack(batch.visuals))[:, 0]
        frames = normalize(network.encoder.align(tokens), dim=-1)
    torch.testing.assert_close(pairs.visuals, normalize(frames[0::2] + frames[1::2], dim=-1))


def test_a_row_without_a_visual_is_refused(clip):
    batch = make_batch(range(2))
    batch.input_ids[0] = 5
    batch = replace(batch, **visual_fields(batch.visuals[1:]))
    with pytest.raises(ValueError, match=r"^1 visuals for 2 captions: .*data=captions"):
        from_source(clip[1])(batch)


def test_only_clip_has_a_context_to_train():
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
    spec = {
        "_target_": "lightning_modules.encoder.siglip.SiglipEncoder",
        "config": {"vision": vision},
    }
    with pytest.raises(ValueError, match=r"^model\.encoder is Siglip.*encoder=clip_large_336"):
        ContrastiveClip(spec, 0.01)
    spec = {"_target_": "lightning_modules.rotary.tad.TadRope"}
    with pytest.raises(ValueError, match=r"TadRope' refused: it is not a subclass of Encoder"):
        ContrastiveClip(spec, 0.01)


# Trained parameters


def test_stretching_keeps_the_pretrained_words_and_first_positions(clip):
    """PPLLaVA's released code makes new, random token embeddings when it stretches the context."""
    model, folder = clip
    embeddings = from_source(folder, context_length=248).encoder.text.embeddings
    trained = model.text_model.embeddings
    assert torch.equal(embeddings.token_embedding.weight, trained.token_embedding.weight)
    positions = embeddings.position_embedding
    assert torch.equal(positions.kept, trained.position_embedding.weight[:20])
    assert torch.equal(positions.stretched[::4], trained.position_embedding.weight[20:])


def test_gradients_reach_the_stretched_positions_and_not_the_kept_ones(clip):
    spec = ENCODER | {"source": clip[1], "feature_layer": -1, "context_length": 248}
    network = ContrastiveClip(spec, 0.01)
    pairs = network(make_batch(range(4), length=200))
    contrast(pairs, pairs.visuals, pairs.captions, rank=0).backward()
    text = network.encoder.text
    positions = text.embeddings.position_embedding
    assert positions.kept.grad is None
    read = positions.stretched.grad.abs().sum(1) > 0
    assert read[: 199 - 20].all()  # the shortest caption has 199 tokens
    assert not read[202 - 20 :].any()
    assert text.embeddings.token_embedding.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in text.encoder.parameters())
    vision = [*network.encoder.vision.parameters(), network.encoder.visual_projection.weight]
    assert all(p.grad is not None for p in vision)
