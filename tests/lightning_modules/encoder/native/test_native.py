"""Towers that read each visual at its own size: order of pixels, packing, chunks, precision."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from datamodules.batch import Grid, Visual, VisualInfo
from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.distributed.sharding import shard
from lightning_modules.encoder.native.patches import Steps, cut_patches, split_steps
from lightning_modules.encoder.native.qwen2_5_vl import Qwen2_5VLEncoder
from lightning_modules.encoder.native.qwen2_vl import Qwen2VLEncoder
from lightning_modules.spec import build
from lightning_modules.training.tuning import compile_layers, recompute
from tests.lightning_modules.encoder.test_chunks import Gathers, peak_of

#: A whole checkpoint in the published layout.
PUBLISHED = Path(__file__).parents[3] / "golden" / "videorope" / "ckpt"
SIZES = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
#: Windows of 2 x 2 tokens, the last ones with fewer; the second block attends to whole steps.
WINDOWS = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
WINDOWS |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
KINDS = {"qwen2_vl": (Qwen2VLEncoder, SIZES), "qwen2_5_vl": (Qwen2_5VLEncoder, WINDOWS)}
TOWERS = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
}
SHAPES = [(5, 16, 24), (1, 8, 8), (4, 32, 16), (2, 16, 24)]


def make(kind="qwen2_vl", **options):
    torch.manual_seed(0)
    encoder, sizes = KINDS[kind]
    made = encoder(config=sizes, **options).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def draw(frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, 3, height, width)
    return Visual(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def visuals_of(shapes=SHAPES):
    return [draw(*shape, seed) for seed, shape in enumerate(shapes)]


def features(encoder, visuals):
    return [tokens.features for tokens in encoder(visuals)]


class Network(nn.Module):
    """A network with an encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, visuals):
        return torch.cat(features(self.encoder, visuals))


def assert_same(found, expected, allowed=1e-5):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, atol=allowed, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_visual_alone_is_as_in_a_batch_of_other_sizes(kind):
    encoder = make(kind)
    alone = [features(encoder, [visual])[0] for visual in visuals_of()]
    assert_same(features(encoder, visuals_of()), alone)
    assert encoder([]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 6, 16])
@torch.no_grad()
def test_chunks_of_time_steps_are_as_one_call(kind, chunk_frames):
    """A chunk is whole steps of two frames, so 1 frame is 2, and 5 frames are 4."""
    encoder, rows = make(kind, chunk_frames=chunk_frames), []
    encoder.blocks()[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert_same(features(encoder, visuals_of()), features(make(kind), visuals_of()))
    steps = max(1, chunk_frames // 2)
    assert len(rows) == -(-7 // steps)
    assert sum(rows) == 4 * (3 * 2 * 3 + 1 + 2 * 4 * 2 + 2 * 3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_time_steps_do_not_attend_to_each_other(kind):
    encoder, visual = make(kind), draw(6, 16, 24)
    before = encoder([visual])[0].as_grid()
    visual.frames[2] = 0
    changed = (encoder([visual])[0].as_grid() != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "change",
    {
        "frames of a pair": lambda frames: frames[[1, 0, 3, 2]],
        "colours": lambda frames: frames[:, [2, 1, 0]],
        "height and width": lambda frames: frames.mT,
        "steps": lambda frames: frames[[2, 3, 0, 1]],
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_exchanged_changes_the_features(kind, change):
    encoder, visual = make(kind), draw(4, 16, 16)
    before = encoder([visual])[0].as_grid()
    other = encoder([Visual(change[1](visual.frames).contiguous())])[0].as_grid()
    back = {"height and width": other.transpose(1, 2)}.get(change[0], other)
    assert (other - before).abs().max() > 0.1
    assert (back - before).abs().max() > 0.1


@torch.no_grad()
def test_an_odd_frame_is_repeated_and_steps_are_shown_when_their_first_frame_is():
    encoder, visual = make(), draw(5, 8, 8)
    visual.info = VisualInfo(seconds=(0.0, 0.5, 1.0, 1.5, 2.0), continues=True, draw=0.5)
    (tokens,) = encoder([visual])
    assert tokens.layout.extent == tokens.grid == Grid(3, 1, 1)
    assert tokens.layout.seconds == (0.0, 1.0, 2.0)
    assert (tokens.layout.continues, tokens.layout.draw) == (True, 0.5)
    even = Visual(torch.cat([visual.frames, visual.frames[-1:]]))
    assert_same(features(encoder, [even]), [tokens.features], 0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_the_tower_of_transformers_up_to_the_mergers_linears(kind):
    """Its patches are in the order of `cut_patches`."""
    encoder = make(kind)
    theirs = TOWERS[kind](deepcopy(encoder.tower.config)).eval()
    own = encoder.tower.state_dict()
    missing, unexpected = theirs.load_state_dict(own, strict=False)
    assert not unexpected
    assert {name.split(".mlp")[0] for name in missing} == {"merger"}
    theirs.merger.mlp = nn.Identity()
    ours = torch.cat(features(encoder, visuals_of()))
    patches = [
        cut_patches(visual.frames, Steps(0, 0, -(-len(visual.frames) // 2)), encoder.cut)
        for visual in visuals_of()
    ]
    grids = torch.tensor([[-(-t // 2), h // 4, w // 4] for t, h, w in SHAPES])
    assert_same([ours], [theirs(torch.cat(patches), grids).pooler_output])


@pytest.mark.parametrize("kind", KINDS)
def test_with_gradients_all_frames_run_at_once_and_recomputed_blocks_agree(kind):
    gradients = []
    for again in (False, True):
        encoder, calls = make(kind, chunk_frames=2).train(), []
        encoder.blocks()[0].attn.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        if again:
            for block in encoder.blocks():
                recompute(block)
        torch.cat(features(encoder, visuals_of())).square().sum().backward()
        assert len(calls) == 1 + again
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
        assert all(gradient is not None for gradient in gradients[-1].values())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_compiled_blocks_agree(kind):
    encoder = make(kind)
    for block in encoder.blocks():
        compile_layers(block, {"backend": "eager"})
    assert_same(features(encoder, visuals_of()), features(make(kind), visuals_of()))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_angles_are_float32_in_half_precision_and_after_the_meta_device(kind):
    """Of 1,000 rows, bfloat16 would give the same place to four in a row."""
    encoder = make(kind)
    expected = list(encoder._pack([(1, 500, 1)], torch.device("cpu")).turn)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            half = KINDS[kind][0](config=KINDS[kind][1])
        half.to_empty(device="cpu")
        half.load_state_dict(encoder.state_dict())
        found = list(half._pack([(1, 500, 1)], torch.device("cpu")).turn)
        tokens = features(half.bfloat16(), visuals_of())
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert tokens[0].dtype == torch.bfloat16
    assert_same([t.float() for t in tokens], features(encoder, visuals_of()), 0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_ranks_with_other_sizes_gather_alike(kind, run_ranks):
    """3 frames are two steps, 11 are six. A block gathers its weights once for all chunks."""

    def run(rank):
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        network = Network(make(kind, chunk_frames=2))
        shard(network, network.encoder.blocks(), mesh)
        visual = draw(11, 16, 8) if rank else draw(3, 8, 24)
        with torch.no_grad(), Gathers() as gathers:
            found = network([visual])
        with Gathers() as blank:
            network([visual] if rank else []).sum().backward()
        distributed.destroy_process_group()
        return found, gathers.count, blank.count

    results = run_ranks(2, run)
    for visual, (found, gathers, blank) in zip(
        [draw(3, 8, 24), draw(11, 16, 8)], results, strict=True
    ):
        with torch.no_grad():
            assert_same([found], features(make(kind), [visual]))
        assert (gathers, blank) == results[0][1:]
        assert gathers == len(make(kind).blocks()) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_output_a_chunk_is_all_that_memory_holds(kind):
    """Twice as many frames need twice the output, but no further normalised frame."""
    encoder = make(kind, chunk_frames=4)
    short, long = (peak_of(lambda n=n: encoder([draw(n, 32, 32)])) for n in (64, 128))
    # uint8 frames that are drawn here (int64 on the way), and the output with its coordinates
    frames, output = 64 * 3 * 32 * 32, 32 * 16 * 4 * (128 + 3 * 4)
    assert long - short < 2 * frames + output
    encoder.chunk_frames = None
    assert peak_of(lambda: encoder([draw(128, 32, 32)])) > 2 * long


def test_steps_are_split_over_visuals():
    assert split_steps([3, 1, 2], 2) == [
        [Steps(0, 0, 2)],
        [Steps(0, 2, 3), Steps(1, 0, 1)],
        [Steps(2, 0, 2)],
    ]
    assert split_steps([3, 1], None) == [[Steps(0, 0, 3), Steps(1, 0, 1)]]


@torch.no_grad()
def test_flops_are_those_of_the_patches():
    network = Network(make())
    meter = FlopMeter(network)
    network([draw(3, 16, 24)])
    patches, width = 2 * 4 * 6, 32
    weights = width * 2 * 3 * 16 + 2 * (4 * width * width + 2 * width * 2 * width)
    attention = 2 * 4 * patches * 24 * width
    assert meter.flops["encoder"] == 2 * patches * weights + attention


@torch.no_grad()
def test_windows_count_their_own_pairs():
    """3 x 5 tokens in windows of 2 x 2: a patch attends to 16, 8 or 4, in one block to 60."""
    network = Network(make("qwen2_5_vl"))
    tokens, attended = network.encoder.reads(3, 24, 40)
    assert tokens == 2 * 60
    pairs = 2 * 16**2 + 3 * 8**2 + 4**2
    assert attended == (pairs / 60 + 60) / 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "set either model.encoder.source or model.encoder.config"),
        ({"config": SIZES, "factor": 28}, "model.encoder.factor is 28.*multiples of 8 pixels"),
        ({"config": SIZES, "chunk_frames": 0}, "model.encoder.chunk_frames is 0"),
        ({"config": SIZES, "attention": "none"}, "model.encoder.attention=none cannot be used"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(options, says):
    with pytest.raises(ValueError, match=says) as error:
        Qwen2VLEncoder(**options)
    assert "\n" not in str(error.value)


def test_frames_of_another_size_name_the_way_out():
    says = "frames of 16 x 20 pixels.*multiples of 8: set data/frames=native"
    with pytest.raises(ValueError, match=says):
        make()([draw(2, 16, 20)])
    with pytest.raises(ValueError, match=says):
        make().extent(2, 16, 20)


@pytest.mark.parametrize("names", ["4.x", "5.x"])
@torch.no_grad()
def test_only_the_tower_of_a_whole_checkpoint_is_read(names, tmp_path, capfd):
    config = json.loads((PUBLISHED / "config.json").read_text())
    stored = load_file(PUBLISHED / "model.safetensors")
    if names == "5.x":
        stored = {
            f"model.{n}" if "visual." in n else n.replace("model.", "model.language_model.", 1): v
            for n, v in stored.items()
        }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = Qwen2VLEncoder(str(tmp_path), factor=28)
    assert "UNEXPECTED" not in capfd.readouterr().err
    for name, value in encoder.tower.state_dict().items():
        prefix = "model.visual." if names == "5.x" else "visual."
        assert torch.equal(value, stored[f"{prefix}{name}"].float())
    again = build(encoder.to_spec())
    again.load_state_dict(encoder.state_dict())
    visual = draw(3, 56, 84)
    assert torch.equal(features(again, [visual])[0], features(encoder, [visual])[0])


def test_a_checkpoint_without_a_tower_is_refused(tmp_path):
    stored = load_file(PUBLISHED / "model.safetensors")
    config = json.loads((PUBLISHED / "config.json").read_text())
    left = {name: value for name, value in stored.items() if "visual." not in name}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 31 of qwen2_vl's weights"):
        Qwen2VLEncoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="is a qwen2, not a qwen2_vl"):
        Qwen2VLEncoder(str(tmp_path))
