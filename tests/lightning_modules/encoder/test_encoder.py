"""The encoder: shortcuts, stretched context and adapters must not change the tower."""

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedModel

from datamodules.batch import Visual
from datamodules.common.spec import resolve
from experiments import CONFIG_DIR
from experiments.run.compose import plain
from lightning_modules.encoder.base import Encoder
from lightning_modules.encoder.clip import ClipEncoder, normalise
from lightning_modules.encoder.prompt import stretch_positions
from lightning_modules.spec import PACKAGE, build

CONFIG = {
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    },
    "text": {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    "projection_dim": 16,
}
ADAPTER = {"depth": 3, "max_frames": 8}
END = CONFIG["text"]["eos_token_id"]


def make(seed=0, **arguments):
    torch.manual_seed(seed)
    encoder = ClipEncoder(**{"config": CONFIG, "context_length": None} | arguments).eval()
    if encoder.adapter is not None:  # fresh ones do not mix frames
        for layer in encoder.adapter.temporal:
            nn.init.normal_(layer.out.weight, std=0.2)
    return encoder


def embed(encoder, prompt_ids):
    """Returns prompts without padding."""
    return encoder.encode_prompt(prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool))


@pytest.fixture
def frames():
    return torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP model as on the hub."""
    torch.manual_seed(7)
    sizes = {"vision_config": CONFIG["vision"], "text_config": CONFIG["text"]}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(**sizes, projection_dim=CONFIG["projection_dim"])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2])
def test_tower_stops_where_the_features_are(clip_folder, layer, frames):
    encoder = ClipEncoder(str(clip_folder), feature_layer=layer, context_length=None).eval()
    full = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        states = full.vision_model(frames, output_hidden_states=True).hidden_states
        torch.testing.assert_close(encoder.hidden_state(frames, [6]), states[layer])
        torch.testing.assert_close(encoder.encode(frames, [6]), states[layer][:, 1:])
    assert len(encoder.vision.encoder.layers) == layer % 5


def test_prompts_and_patches_share_the_space_of_clip(clip_folder):
    encoder = ClipEncoder(str(clip_folder), feature_layer=-1, context_length=None).eval()
    full = CLIPModel.from_pretrained(clip_folder).eval()
    image = torch.randn(1, 3, 24, 24)
    ids = torch.tensor([[0, 5, 9, END]])
    with torch.no_grad():
        expected = full(input_ids=ids, pixel_values=image)
        ours = encoder.align(encoder.hidden_state(image, [1])[:, :1])[:, 0]
        prompt = embed(encoder, ids)
    torch.testing.assert_close(nn.functional.normalize(ours), expected.image_embeds)
    torch.testing.assert_close(nn.functional.normalize(prompt), expected.text_embeds)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_visuals_do_not_see_one_another(adapter, frames):
    encoder = make(bt_adapter=adapter)
    together = encoder.encode(frames, [2, 1, 1, 2])
    apart = [encoder.encode(part, [len(part)]) for part in frames.split([2, 1, 1, 2])]
    torch.testing.assert_close(together, torch.cat(apart))


def test_per_frame_says_whether_frames_see_one_another(frames):
    for adapter in (None, ADAPTER):
        encoder = make(bt_adapter=adapter)
        whole, frame_by_frame = encoder.encode(frames, [6]), encoder.encode(frames, [1] * 6)
        assert torch.allclose(whole, frame_by_frame, atol=1e-5) == encoder.per_frame


def test_fresh_adapter_starts_as_a_copy_of_its_layers():
    torch.manual_seed(0)
    encoder = ClipEncoder(config=CONFIG, context_length=None, bt_adapter=ADAPTER)
    assert encoder.adapter is not None
    trunk = encoder.vision.encoder.layers[encoder.branch_start :]
    assert len(encoder.adapter.spatial) == len(trunk) == 2  # the third comes after the features
    for copy, layer in zip(encoder.adapter.spatial, trunk, strict=True):
        for ours, theirs in zip(copy.parameters(), layer.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert not any(layer.out.weight.any() for layer in encoder.adapter.temporal)


def test_no_visuals_at_all():
    for adapter in (None, ADAPTER):
        assert make(bt_adapter=adapter)([]) == []


def test_bytes_are_normalised_and_floats_are_not():
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    floats = normalise(pixels)
    assert normalise(floats) is floats
    # CLIP's own numbers: black is -mean / std, white is (1 - mean) / std.
    ends = normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    expected = torch.tensor([[-1.7923, -1.7521, -1.4802], [1.9303, 2.0749, 2.1459]])
    torch.testing.assert_close(ends.flatten(1), expected, atol=1e-4, rtol=0)
    encoder = make()
    torch.testing.assert_close(encoder.encode(pixels, [2]), encoder.encode(floats, [2]))


def test_padding_does_not_change_a_prompt():
    encoder = make()
    short, long = [0, 7, 8, END], [0, 3, 4, 5, 6, 7, END]
    padded = torch.tensor([short + [END] * 3, long])
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    together = encoder.encode_prompt(padded, mask)
    for row, ids in zip(together, (short, long), strict=True):
        torch.testing.assert_close(row, embed(encoder, torch.tensor([ids]))[0])


def test_a_row_without_a_prompt_gives_numbers():
    encoder = make()
    nothing = encoder.encode_prompt(torch.full((1, 5), END), torch.zeros(1, 5, dtype=torch.bool))
    assert nothing.isfinite().all()


def test_stretched_context(clip_folder):
    plain = ClipEncoder(str(clip_folder), context_length=None).eval()
    stretched = ClipEncoder(str(clip_folder), context_length=248, kept_positions=20).eval()
    assert (plain.context_length, stretched.context_length) == (77, 248)
    ours, theirs = (encoder.text.embeddings.token_embedding for encoder in (stretched, plain))
    assert torch.equal(ours.weight, theirs.weight)
    short = torch.tensor([[0, *range(2, 20), END]])  # 20 tokens: all on kept positions
    torch.testing.assert_close(embed(stretched, short), embed(plain, short))
    long = torch.randint(2, 64, (1, 200)).index_fill(1, torch.tensor([199]), END)
    assert embed(stretched, long).isfinite().all()
    with pytest.raises(ValueError, match=r"prompt of 200 .* 77 positions"):
        embed(plain, long)


def test_stretching_keeps_the_start_and_steps_evenly():
    table = torch.arange(10.0)[:, None].expand(10, 2)
    ours = stretch_positions(table, 4 + 3 * 6, kept=4)[:, 0]
    expected = torch.cat([torch.arange(4.0), 4 + torch.arange(18) / 3])
    torch.testing.assert_close(ours, expected)


def test_kept_positions_can_be_frozen_alone():
    encoder = make(context_length=248)
    positions = encoder.text.embeddings.position_embedding
    positions.kept.requires_grad_(False)
    ids = torch.randint(2, 64, (1, 60)).index_fill(1, torch.tensor([59]), END)
    embed(encoder, ids).sum().backward()
    assert positions.kept.grad is None
    assert positions.stretched.grad[:40].abs().sum() > 0


ARGUMENTS = [{}, {"context_length": 248}, {"bt_adapter": ADAPTER}, {"feature_layer": 3}]


class Holder(PreTrainedModel):
    """A model around the encoder that transformers can save and load."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = build(config.encoder)
        self.post_init()

    def _init_weights(self, module):
        pass


def results(encoder, frames):
    ids = torch.tensor([[0, 5, 9, 3, END]])
    with torch.no_grad():
        patches = encoder.encode(frames, [4, 2])
        return patches, encoder.align(patches), embed(encoder, ids)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_spec_and_weights_rebuild_it(arguments, frames, tmp_path):
    encoder = make(**arguments)
    spec = yaml.safe_load(yaml.safe_dump(encoder.to_spec()))  # so it is plain data
    again = build(spec).eval()
    assert again.to_spec() == encoder.to_spec()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(results(again, frames), results(encoder, frames), rtol=0, atol=0)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_transformers_saves_and_loads_it(arguments, frames, tmp_path):
    encoder = make(**arguments)
    config = PreTrainedConfig()
    config.encoder = encoder.to_spec()
    holder = Holder(config)
    holder.encoder.load_state_dict(encoder.state_dict())
    holder.save_pretrained(tmp_path)
    loaded = Holder.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(results(loaded.encoder, frames), results(encoder, frames))


@pytest.mark.parametrize("arguments", [{}, {"context_length": 248, "bt_adapter": ADAPTER}])
def test_a_model_around_it_leaves_its_weights(arguments, clip_folder):
    config = PreTrainedConfig()
    config.encoder = {
        "_target_": "lightning_modules.encoder.clip.ClipEncoder",
        "source": str(clip_folder),
        "context_length": None,
    } | arguments
    torch.manual_seed(3)
    alone = build(config.encoder).state_dict()
    torch.manual_seed(3)
    held = Holder(config).encoder.state_dict()
    assert alone.keys() == held.keys()
    assert all(torch.equal(alone[name], held[name]) for name in alone)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_built_without_memory_then_filled(arguments, frames):
    encoder = make(**arguments)
    with torch.device("meta"):
        empty = build(encoder.to_spec())
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        buffer.fill_(10**6)  # possible contents of memory
    empty.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(results(empty.eval(), frames), results(encoder, frames))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": None}, "either model.encoder.source or model.encoder.config"),
        ({"source": "somewhere"}, "either model.encoder.source or model.encoder.config"),
        ({"feature_layer": -6}, "choose -5 to 4"),
        ({"feature_layer": 5}, "choose -5 to 4"),
        ({"context_length": 100}, "20 . k . 57, such as 248"),
        ({"context_length": 40}, "20 . k . 57, such as 248"),
        ({"bt_adapter": {"depth": 1, "max_frames": 8}}, "choose 2 to 4"),
        ({"bt_adapter": {"depth": 5, "max_frames": 8}}, "choose 2 to 4"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


def test_frames_that_do_not_fit(frames):
    with pytest.raises(ValueError, match=r"20 x 24 pixels.*24 x 24"):
        make()([Visual(frames[:, :, :20])])
    with pytest.raises(ValueError, match=r"visual of 6 frames.*4 temporal positions"):
        make(bt_adapter={"depth": 2, "max_frames": 4})([Visual(frames)])


def test_source_without_a_text_tower(clip_folder, tmp_path):
    CLIPModel.from_pretrained(clip_folder).vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whole CLIP model"):
        ClipEncoder(str(tmp_path))


def test_blocks_are_all_repeated_layers():
    encoder = make(bt_adapter=ADAPTER)
    inside = {id(p) for block in encoder.blocks() for p in block.parameters()}
    outside = {name for name, p in encoder.named_parameters() if id(p) not in inside}
    assert len(encoder.blocks()) == 3 + 1 + 2
    assert not any("layers." in name or ".temporal." in name for name in outside)


def test_every_option_is_an_encoder(compose, tmp_path):
    options = {file.stem for file in (CONFIG_DIR / "encoder").glob("*.yaml")}
    assert {"clip_large_336", "clip_tiny"} <= options
    for option in options:
        spec = plain(compose([f"encoder={option}"], tmp_path).model.encoder)
        assert issubclass(resolve(spec["_target_"], PACKAGE), Encoder)
        if spec["source"] is None:
            encoder = build(spec)
            (tokens,) = encoder([Visual(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))])
            assert tokens.features.shape == (encoder.extent(2, 64, 64).size, encoder.width)


def test_an_image_size_that_is_not_the_towers():
    config = plain(OmegaConf.load(CONFIG_DIR / "encoder" / "clip_tiny.yaml").config.text)
    vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="image_size is 64"):
        ClipEncoder(config={"vision": vision, "text": config, "projection_dim": 8}, image_size=64)
