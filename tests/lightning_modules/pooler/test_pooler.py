"""Poolers: which windows fit, and that shortcuts change nothing."""

import math

import pytest
import torch

from datamodules.batch import Grid
from experiments.run.compose import plain
from lightning_modules.pooler.average import AveragePooler
from lightning_modules.pooler.identity import IdentityPooler
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.projector import Projector
from lightning_modules.spec import build
from lightning_modules.tokens import VisualTokens

WINDOWS = [
    {"kernel": (2, 3, 3)},
    {"kernel": (3, 3, 3), "stride": (2, 3, 1), "crop": True},  # windows overlap
    {"kernel": (1, 2, 2), "stride": (3, 4, 4), "crop": True},  # gaps between windows
    {"output_size": (3, 4, 5)},
    {"output_size": (4, 2, 2), "stride": (2, 3, 3)},
    {"output_size": (3, 2, 2), "kernel": (4, 3, 3)},
]
SHAPE = Grid(9, 6, 6)


@pytest.fixture
def patches():
    return torch.randn(*SHAPE, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def relevance():
    return torch.rand(*SHAPE, generator=torch.Generator().manual_seed(1)) * 0.2


def pool(pooler, patches, relevance=None, expand=None):
    """Returns the pooled features on their grid: t h w d -> t2 h2 w2 m."""
    relevance = None if relevance is None else relevance.flatten()
    tokens = pooler(VisualTokens.on_grid(patches), relevance, expand)
    assert tokens.grid == pooler.extent(Grid(*patches.shape[:3]))
    return tokens.as_grid()


def mean_by_loop(pooler, patches, relevance):
    """Computes the definition, one window at a time."""
    fitted = pooler.fit(SHAPE)
    out = torch.empty(*fitted.count, patches.shape[-1])
    for where in torch.cartesian_prod(*(torch.arange(n) for n in fitted.count)).tolist():
        window = tuple(
            slice(i * step, i * step + size)
            for i, step, size in zip(where, fitted.stride, fitted.kernel, strict=True)
        )
        weights = (relevance[window].flatten() * math.exp(pooler.logit_scale)).softmax(0)
        out[tuple(where)] = weights @ patches[window].flatten(0, 2)
    return out


@pytest.mark.parametrize("windows", WINDOWS)
def test_weighted_mean_is_that_of_each_window(windows, patches, relevance):
    pooler = PromptGuidedPooler(**windows, logit_scale=3.0)
    expected = mean_by_loop(pooler, patches, relevance)
    assert pooler.extent(SHAPE) == expected.shape[:3]
    torch.testing.assert_close(pool(pooler, patches, relevance), expected)


@pytest.mark.parametrize("windows", WINDOWS)
def test_second_linear_commutes_with_pooling(windows, patches, relevance):
    pooler, projector = PromptGuidedPooler(**windows), Projector(8, 16)
    before = pool(pooler, projector.contract(projector.expand(patches)), relevance)
    after = projector.contract(pool(pooler, patches, relevance, projector.expand))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("windows", WINDOWS)
def test_chunks_equal_the_whole(windows, patches, relevance):
    pooler, projector = PromptGuidedPooler(**windows), Projector(8, 16)
    whole = pool(pooler, patches, relevance, projector.expand)
    sizes = []

    def expand(frames):
        sizes.append(len(frames))
        return projector.expand(frames)

    with torch.no_grad():
        chunked = pool(pooler, patches, relevance, expand)
    torch.testing.assert_close(chunked, whole)
    assert len(sizes) > 1
    assert max(sizes) < SHAPE.t


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("double_softmax", [False, True])
def test_average_is_prompt_guided_without_a_preference(windows, double_softmax, patches):
    guided = PromptGuidedPooler(**windows, double_softmax=double_softmax)
    pooled = pool(guided, patches, torch.zeros(SHAPE))
    torch.testing.assert_close(pool(AveragePooler(**windows), patches), pooled)
    size = guided.fit(SHAPE).kernel.size
    assert guided.last_effective_tokens.item() == pytest.approx(size, rel=1e-4)


def test_gradient_is_that_of_the_definition(patches, relevance):
    pooler = PromptGuidedPooler(kernel=(2, 3, 3), logit_scale=3.0)
    patches.requires_grad_(), relevance.requires_grad_()
    ours = torch.autograd.grad(
        pool(pooler, patches, relevance).square().sum(), (patches, relevance)
    )
    long_way = mean_by_loop(pooler, patches, relevance).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(long_way, (patches, relevance)))


def test_a_strong_preference_picks_one_patch(patches):
    relevance = torch.zeros(SHAPE)
    relevance[0::2, 1::3, 2::3] = 1.0
    pooler = PromptGuidedPooler(kernel=(2, 3, 3))
    pooled = pool(pooler, patches, relevance)
    torch.testing.assert_close(pooled, patches[0:8:2, 1::3, 2::3])
    assert pooler.last_effective_tokens.item() == pytest.approx(1.0)


def test_double_softmax_flattens_over_many_patches():
    relevance = torch.randn(32, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.01
    patches = torch.zeros(32, 24, 24, 1)
    effective = {}
    for double in (False, True):
        pooler = PromptGuidedPooler(kernel=(2, 3, 3), double_softmax=double)
        pool(pooler, patches, relevance)
        effective[double] = pooler.last_effective_tokens.item()
    assert effective[True] > 17.9
    assert effective[False] < 14


def test_temperature_sharpens(patches, relevance):
    effective = []
    for temperature in (10.0, 1.0, 0.1):
        pooler = PromptGuidedPooler(kernel=(2, 3, 3), temperature=temperature)
        pool(pooler, patches, relevance)
        effective.append(pooler.last_effective_tokens.item())
    assert effective == sorted(effective, reverse=True)


def test_image_has_its_own_kernel():
    image, video = Grid(1, 6, 6), Grid(8, 6, 6)
    assert AveragePooler(kernel=(2, 3, 3)).extent(image) == (1, 2, 2)
    pooler = AveragePooler(kernel=(2, 3, 3), image_kernel=(1, 2, 2))
    assert pooler.extent(image) == (1, 3, 3)
    assert pooler.extent(video) == (4, 2, 2)
    assert pool(pooler, torch.zeros(*image, 4)).shape == (1, 3, 3, 4)


def test_output_size_keeps_the_frames_of_a_short_visual():
    pooler = AveragePooler(output_size=(4, 2, 2))
    assert [pooler.extent(Grid(t, 6, 6)).t for t in (1, 3, 4, 9)] == [1, 3, 4, 4]


@pytest.mark.parametrize(
    "windows",
    [
        {"output_size": (8, 3, 3)},
        {"output_size": (8, 3, 3), "kernel": (2, 2, 2)},
        {"output_size": (8, 3, 3), "stride": (2, 2, 2)},
    ],
)
def test_a_video_of_any_length_fits_an_output_size(windows):
    """A short one keeps all its frames, whatever kernel or stride long ones have."""
    pooler = AveragePooler(**windows)
    for frames in range(1, 9):
        assert pooler.extent(Grid(frames, 6, 6)) == (frames, 3, 3)
    pooled = pool(pooler, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 6, 6, 1))
    assert torch.equal(pooled[:, 0, 0, 0], torch.arange(3.0))


def test_identity_keeps_every_patch(patches):
    pooler, projector = IdentityPooler(), Projector(8, 16)
    assert pooler.extent(SHAPE) == SHAPE
    tokens = VisualTokens.on_grid(patches)
    assert pooler(tokens) is tokens
    assert torch.equal(pool(pooler, patches, None, projector.expand), projector.expand(patches))


@pytest.mark.parametrize(
    ("windows", "grid", "words"),
    [
        ({"kernel": (2, 7, 7)}, (8, 6, 6), ("[2, 7, 7]", "8 x 6 x 6", "[2, 6, 6]")),
        ({"kernel": (2, 4, 4)}, (8, 6, 6), ("[2, 4, 4]", "8 x 6 x 6", "[2, 3, 3]")),
        ({"kernel": (4, 3, 3)}, (3, 6, 6), ("[4, 3, 3]", "3 x 6 x 6", "[3, 3, 3]")),
        ({"kernel": (2, 3, 3), "stride": (2, 4, 4)}, (8, 6, 6), ("stride [2, 4, 4]", "[2, 3, 3]")),
        ({"output_size": (4, 8, 8)}, (8, 6, 6), ("output_size [4, 8, 8]", "[4, 6, 6]")),
        (
            {"kernel": (2, 3, 3), "image_kernel": (1, 4, 4)},
            (1, 6, 6),
            ("image_kernel", "[1, 3, 3]"),
        ),
    ],
)
def test_windows_that_do_not_fit_say_what_would(windows, grid, words):
    with pytest.raises(ValueError, match=r"model\.pooler\.") as error:
        AveragePooler(**windows).extent(Grid(*grid))
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "windows",
    [{}, {"stride": (1, 1, 1)}, {n: (1, 1, 1) for n in ("kernel", "stride", "output_size")}],
)
def test_windows_need_one_or_two_sizes(windows):
    with pytest.raises(ValueError, match="one or two of"):
        AveragePooler(**windows)


def test_relevance_is_a_cosine_in_float32():
    patches = torch.randn(10, 8, dtype=torch.bfloat16)
    score = IdentityPooler().relevance(patches, patches[8] * 7)
    assert score.dtype == torch.float32
    assert score[8].item() == pytest.approx(1.0, abs=1e-3)
    assert score.abs().max() <= 1.001


def test_half_precision_follows_the_patches(patches, relevance):
    pooler = PromptGuidedPooler(kernel=(2, 3, 3)).to(torch.bfloat16)
    pooled = pool(pooler, patches.bfloat16(), relevance)
    assert pooled.dtype == torch.bfloat16
    exact = pool(PromptGuidedPooler(kernel=(2, 3, 3)), patches, relevance)
    torch.testing.assert_close(pooled.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("none", (32, 24, 24), 32 * 24 * 24),
        ("average", (32, 24, 24), 1024),
        ("average_11x11", (32, 24, 24), 16 * 11 * 11),
        ("prompt_guided", (32, 24, 24), 1024),
        ("average_2x2", (8, 4, 4), 32),
        ("prompt_guided_2x2", (8, 4, 4), 32),
    ],
)
def test_the_options_leave_what_they_say(option, before, after, compose, tmp_path):
    pooler = build(plain(compose([f"pooler={option}"], tmp_path).model.pooler))
    assert pooler.extent(Grid(*before)).size == after
