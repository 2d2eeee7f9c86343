"""For the backward pass, pooling keeps the patches, not the projector's output for them."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.lora import add_lora
from lightning_modules.pooler import identity, windows
from lightning_modules.pooler.average import AveragePooler
from lightning_modules.pooler.identity import IdentityPooler
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.projector import Projector
from lightning_modules.recompute import is_running_again, made_again
from lightning_modules.tokens import VisualTokens
from tests.lightning_modules.pooler.test_pooler import SHAPE, WINDOWS
from tests.lightning_modules.test_model import COUNTS, MIXED, make_batch, make_model

POOLERS = {
    "average": lambda: AveragePooler(kernel=(2, 3, 3)),
    "prompt_guided": lambda: PromptGuidedPooler(kernel=(2, 3, 3), logit_scale=3.0),
    "none": lambda: IdentityPooler(),
}
WIDTH, WIDE = 8, 64


@pytest.fixture
def kept_whole(monkeypatch):
    """Pools without the shortcut: everything is kept for the backward pass."""

    def run(function):
        with monkeypatch.context() as context:
            for module in (windows, identity):
                context.setattr(module, "made_again", lambda f, *arguments: f(*arguments))
            return function()

    return run


def pool(pooler, dtype=torch.float64):
    """Returns the tokens, and all that their gradient reaches."""
    torch.manual_seed(0)
    projector = Projector(WIDTH, WIDE).to(dtype)
    patches = torch.randn(*SHAPE, WIDTH, dtype=dtype, requires_grad=True)
    relevance = torch.rand(*SHAPE, requires_grad=True)
    tokens = pooler(VisualTokens.on_grid(patches), relevance.flatten(), projector.expand)
    return projector.contract(tokens.features), [patches, relevance, *projector.parameters()]


def gradients(pooler, dtype=torch.float64):
    tokens, reached = pool(pooler, dtype)
    return torch.autograd.grad(tokens.square().sum(), reached, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooler", POOLERS)
def test_gradients_are_the_same_to_the_last_bit(pooler, dtype, kept_whole):
    expected = kept_whole(lambda: gradients(POOLERS[pooler](), dtype))
    found = gradients(POOLERS[pooler](), dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert sum(gradient is not None for gradient in found) >= 5


@pytest.mark.parametrize("sizes", WINDOWS)
def test_gradients_are_the_same_for_all_windows(sizes, kept_whole):
    pooler = PromptGuidedPooler(**sizes, logit_scale=3.0)
    expected = kept_whole(lambda: gradients(pooler))
    for ours, theirs in zip(gradients(pooler), expected, strict=True):
        assert torch.equal(ours, theirs)


def bytes_kept(run):
    """Returns the bytes of the storages that a forward pass keeps for its backward pass."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize(("pooler", "wide"), [("average", 0), ("prompt_guided", 0), ("none", 1)])
def test_of_the_projector_no_activation_of_every_patch_is_kept(pooler, wide, kept_whole):
    """Without pooling every patch is a token, which the second linear keeps: one of two is left."""
    activation = SHAPE.size * WIDE * 4  # bytes, of one of the two
    few = activation // 2  # weights, patches and tokens together
    found = bytes_kept(lambda: pool(POOLERS[pooler](), torch.float32)[0])
    long_way = kept_whole(lambda: bytes_kept(lambda: pool(POOLERS[pooler](), torch.float32)[0]))
    assert wide * activation <= found < wide * activation + few
    assert long_way - found >= activation


@pytest.mark.parametrize("pooler", ["average", "prompt_guided"])
def test_a_model_has_the_same_gradients_and_the_same_counts(pooler, kept_whole):
    """FLOPs are those of one forward and one backward. Recomputation does not count."""

    def step():
        model = make_model(pooler=pooler).train()
        meter = FlopMeter(model)
        model(make_batch(MIXED, COUNTS)).loss.backward()
        meter.remove()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, meter.flops

    expected, flops = kept_whole(step)
    found, counted = step()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert counted == flops
    assert counted["projector"] > 0


def test_dropout_of_lora_is_drawn_again_as_it_was(kept_whole):
    def run():
        torch.manual_seed(0)
        part = nn.ModuleDict({"projector": Projector(WIDTH, WIDE)})
        add_lora(part, targets=["linear_1"], rank=4, alpha=8, dropout=0.5, stage="projector")
        for name, parameter in part.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        patches = torch.randn(*SHAPE, WIDTH)
        pooler = AveragePooler(kernel=(2, 3, 3))
        tokens = pooler(VisualTokens.on_grid(patches), None, part.projector.expand).features
        trained = [p for p in part.parameters() if p.requires_grad]
        return torch.autograd.grad(tokens.square().sum(), trained)

    for ours, theirs in zip(run(), kept_whole(run), strict=True):
        assert torch.equal(ours, theirs)


def test_what_runs_again_says_so():
    said = []

    def double(x):
        said.append(is_running_again())
        return 2 * x.exp()

    made_again(double, torch.ones(3, requires_grad=True)).sum().backward()
    assert said == [False, True]
    assert not is_running_again()
