"""Frames in chunks give the same results as all frames at once, with less memory."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.batch import Visual
from lightning_modules.distributed.sharding import shard
from lightning_modules.encoder.clip import ClipEncoder
from lightning_modules.encoder.clip_vision import ClipVisionEncoder
from lightning_modules.encoder.siglip import SiglipEncoder
from lightning_modules.training.tuning import compile_layers
from tests.lightning_modules.encoder.test_encoder import ADAPTER, CONFIG, make

KINDS = {
    "clip": lambda **options: make(**options),
    "clip_bt": lambda **options: make(bt_adapter=ADAPTER, **options),
    "clip_vision": lambda **options: ClipVisionEncoder({"vision": CONFIG["vision"]}, **options),
    "siglip": lambda **options: SiglipEncoder(config={"vision": CONFIG["vision"]}, **options),
}


def make_kind(kind, chunk_frames):
    torch.manual_seed(0)
    return KINDS[kind](chunk_frames=chunk_frames).eval()


def draw(count):
    shape, seed = (count, 3, 24, 24), torch.Generator().manual_seed(count)
    return torch.randint(0, 256, shape, generator=seed, dtype=torch.uint8)


def watch(encoder):
    """Returns the number of frames in each call of the patch embedding, and of the first layer."""
    seen = {"start": [], "layer": []}
    tower = encoder.vision
    for name, module in (
        ("start", tower.embeddings.patch_embedding),
        ("layer", tower.encoder.layers[0]),
    ):
        module.register_forward_pre_hook(lambda _, args, n=name: seen[n].append(len(args[0])))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "sizes"), [(4, [4]), (8, [4, 4]), (7, [4, 3]), (5, [4, 1])])
@torch.no_grad()
def test_chunks_give_what_all_frames_give_at_once(kind, count, sizes):
    """Equal within the rounding of a matrix product of another height: 1e-6 of values of size 1."""
    encoder = make_kind(kind, 4)
    expected = make_kind(kind, None).encode(draw(count), [2, count - 2])
    seen = watch(encoder)
    found = encoder.encode(draw(count), [2, count - 2])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert seen["start"] == seen["layer"] == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_in_training_runs_in_chunks_and_others_do_not(kind):
    """BT-Adapter connects the frames, so its layers take all frames at once in any case."""
    encoder = make_kind(kind, 4).train()
    seen = watch(encoder)
    whole = encoder.encode(draw(6), [6])
    assert whole.requires_grad
    assert seen == {"start": [6], "layer": [6]}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith("adapter"))
    frozen = encoder.encode(draw(6), [6])
    assert seen == {"start": [6, 4, 2], "layer": [6, 4, 2]}
    assert frozen.requires_grad == (kind == "clip_bt")
    torch.testing.assert_close(frozen, whole, atol=1e-6, rtol=1e-6)
    # One trained parameter is enough to keep all activations, so all frames run at once.
    encoder.vision.encoder.layers[0].layer_norm1.bias.requires_grad_(True)
    assert encoder.encode(draw(6), [6]).requires_grad
    assert seen["layer"][3:] == [6]


def test_the_adapter_has_its_gradients_beside_a_frozen_tower():
    def gradients(chunk_frames):
        encoder = make_kind("clip_bt", chunk_frames).train()
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name.startswith("adapter"))
        encoder.encode(draw(7), [4, 3]).square().sum().backward()
        return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients(None)
    assert expected
    torch.testing.assert_close(gradients(2), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_keep_the_dtype_of_mixed_precision(kind):
    """Results of a layer are not rounded to the dtype of its input."""
    encoder, whole = make_kind(kind, 2), make_kind(kind, None)
    for precision in (torch.bfloat16, None):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            found, expected = encoder.encode(draw(5), [5]), whole.encode(draw(5), [5])
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


class Wider(nn.Module):
    """A layer that returns float64."""

    def forward(self, hidden, mask):
        return hidden.double() / 3


@torch.no_grad()
def test_a_layer_that_widens_is_not_narrowed():
    encoder = make_kind("clip_vision", 2)
    encoder.vision.encoder.layers.append(Wider())
    found = encoder.encode(draw(5), [5])
    assert found.dtype == torch.float64
    encoder.chunk_frames = None
    torch.testing.assert_close(found, encoder.encode(draw(5), [5]), atol=1e-6, rtol=1e-6)


def peak(encoder, count):
    """Returns the peak bytes beyond the frames."""
    frames = draw(count)
    return peak_of(lambda: encoder.encode(frames, [count]))


def peak_of(compute):
    """Returns the peak bytes of a computation without gradients, as torch's allocator counts."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=True) as run:
        compute()
    held = most = 0
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip"])
def test_beside_the_output_a_chunk_is_all_that_memory_holds(kind):
    """Twice as many frames need twice the output, but no further normalised frame."""
    encoder = make_kind(kind, 4)
    short, long = peak(encoder, 64), peak(encoder, 128)
    frame = 4 * 10 * 32  # bytes of the tokens of one frame, class token included
    assert long - short <= 64 * frame + 4096
    encoder.chunk_frames = None
    assert peak(encoder, 128) > 4 * long


@pytest.mark.parametrize("kind", ["clip", "clip_vision", "siglip"])
def test_the_size_is_kept_with_the_model_and_checked(kind):
    assert make_kind(kind, 5).to_spec()["chunk_frames"] == 5
    assert make_kind(kind, None).to_spec()["chunk_frames"] is None
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"model.encoder.chunk_frames is {size}: set"):
            make_kind(kind, size)
    assert ClipEncoder(config=CONFIG, context_length=None).chunk_frames == 16


@torch.no_grad()
def test_compiled_layers_are_not_compiled_anew_for_every_number_of_frames():
    """At most five times: once for the first size, then for many frames and for one frame.

    These two occur as the first chunk and as a later one. Then no number of frames compiles again.
    """
    encoder, plain = make_kind("clip_vision", 4), make_kind("clip_vision", 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in encoder.blocks():
        compile_layers(block, {"backend": "eager"})
    graphs = []
    for count in (8, 4, 7, 5, 6, 9, 3, 1, 11, 13, 22, 2, 34, 39, 10):
        found = encoder.encode(draw(count), [count])
        torch.testing.assert_close(found, plain.encode(draw(count), [count]), atol=1e-6, rtol=1e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[8] == graphs[-1] <= 5, graphs
    torch._dynamo.reset()


class Gathers(TorchDispatchMode):
    """Counts how often this rank gathers with the others."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["clip", "clip_bt", "siglip"])
def test_sharded_ranks_with_other_numbers_of_frames_gather_alike(kind, run_ranks):
    """3 frames are one chunk, 11 are six. A layer gathers its weights once for all chunks."""
    counts = (3, 8)

    def run(rank):
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        names = ("data_parallel", "tensor_parallel")
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=names)
        encoder = make_kind(kind, 2 if rank else 4)
        shard(encoder, encoder.blocks(), mesh)
        found, frames = [], draw(counts[rank])
        for frozen in (False, True):
            encoder.requires_grad_(not frozen)
            with torch.set_grad_enabled(frozen), Gathers() as gathers:
                found.append(encoder([Visual(frames)])[0].as_grid().flatten(1, 2))
            found.append(gathers.count)
        layers = encoder.vision.encoder.layers
        apart = all(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
        distributed.destroy_process_group()
        return *found, apart

    results = run_ranks(2, run)
    for count, (evaluated, gathers, trained, again, apart) in zip(counts, results, strict=True):
        with torch.no_grad():
            expected = make_kind(kind, None).encode(draw(count), [count])
        torch.testing.assert_close(evaluated, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(trained, expected, atol=1e-6, rtol=1e-6)
        assert apart, "the layers have freed the weights"
        assert (gathers, again) == (results[0][1], results[0][3])
        blocks = len(make_kind(kind, None).vision.encoder.layers) + (kind == "clip_bt")
        assert blocks <= gathers <= blocks + 2
