"""The token contract, for every option in configs/encoder, configs/pooler and configs/rotary."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from datamodules.batch import Visual, VisualInfo
from experiments import CONFIG_DIR
from experiments.run.compose import plain
from lightning_modules.pooler.base import Pooler
from lightning_modules.projector import Projector
from lightning_modules.rotary.base import RotaryScheme
from lightning_modules.spec import build
from lightning_modules.tokens import Layout, VisualTokens
from tests.helpers.grids import grids_of


def options(component):
    return sorted(path.stem for path in (CONFIG_DIR / component).glob("*.yaml"))


#: A small tower of Qwen2.5-VL.
WINDOWED = {
    "config": {
        **{"depth": 2, "hidden_size": 96, "num_heads": 3, "intermediate_size": 96},
        **{"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
    },
    "factor": 16,
}

#: Wide features, so that each patch of a window is the largest one of some channel.
WIDTH = 256


@pytest.fixture(scope="module")
def make(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")

    @cache
    def spec_of(component, option):
        return plain(compose([f"{component}={option}"], folder).model[component])

    def make(component, option):
        torch.manual_seed(0)
        spec = spec_of(component, option)
        if component == "encoder" and spec["source"]:  # the same class, small and random
            spec = {**spec, "source": None}
            if "factor" in spec:  # it reads frames of any size
                small = WINDOWED if "qwen2_5" in option else spec_of("encoder", "qwen2_vl_tiny")
                return build({**spec, "config": small["config"], "factor": small["factor"]})
            small = spec_of("encoder", "clip_tiny")["config"]
            spec |= {"config": small, "context_length": None, "image_size": 64}
            if spec.get("bt_adapter"):
                spec |= {"bt_adapter": {"depth": 2, "max_frames": 8}}
        return build(spec)

    return make


def draw(grid, width=6):
    """Returns random tokens on a grid, with 0.4 seconds from one time step to the next."""
    generator = torch.Generator().manual_seed(grid.size)
    seconds = tuple(0.4 * n for n in range(grid.t)) if grid.t > 1 else None
    features = torch.randn(*grid, width, generator=generator)
    return VisualTokens.on_grid(features, seconds=seconds)


def relevance_of(pooler, tokens, seed=1):
    """Returns random cosines, as close to each other as real ones."""
    if not pooler.uses_prompt:
        return None
    return torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed)) * 0.1


def some(count, most):
    """Returns at most `most` numbers below `count`, with the first and the last one."""
    return sorted({round(n) for n in torch.linspace(0, count - 1, most).tolist()})


def shares_of(tokens, pooled, number):
    """Returns the share of each patch in the place of a token. The gradient tells the patches.

    A token stands at the mean of the patches that it depends on. Interpolation, whose weights do
    not depend on features, may stand at the weighted mean.
    """
    token = pooled.features[number].sum()
    (reached,) = torch.autograd.grad(token, tokens.features, retain_graph=True)
    weights = reached.abs().sum(1)
    equal = (weights > 0).float()
    shares = [each / each.sum() for each in (equal, weights)]
    stands = pooled.layout.coordinates[number]
    for share in shares:
        if torch.allclose(share @ tokens.layout.coordinates, stands, atol=1e-4):
            return share
    middle = (shares[0] @ tokens.layout.coordinates).tolist()
    raise AssertionError(f"token {number} stands at {stands.tolist()}, its patches at {middle}")


@pytest.mark.parametrize("option", options("pooler"))
class TestPooler:
    def test_extent_is_the_grid_that_the_tokens_fill(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(pooler):
            tokens = draw(grid)
            pooled = pooler(tokens, relevance_of(pooler, tokens))
            assert isinstance(pooler, Pooler)
            assert pooled.grid == pooler.extent(grid)
            assert len(pooled) == len(pooled.layout) == pooled.grid.size
            assert pooled.layout.extent == grid
            assert pooled.features.shape[1] == pooler.width(6)

    def test_the_rest_of_the_layout_is_handed_on(self, option, make):
        pooler = make("pooler", option)
        tokens = draw(grids_of(pooler)[0])
        known = replace(tokens.layout, draw=0.25, continues=True)
        tokens = replace(tokens, layout=known)
        layout = pooler(tokens, relevance_of(pooler, tokens)).layout
        assert (layout.seconds, layout.draw, layout.continues) == (known.seconds, 0.25, True)

    def test_the_second_linear_may_run_after_the_pooler(self, option, make):
        """The projector's shortcut: `contract(pool(expand(x))) = pool(contract(expand(x)))`."""
        pooler = make("pooler", option)
        projector = Projector(pooler.width(6), 8)
        for grid in grids_of(pooler):
            tokens = draw(grid)
            relevance = relevance_of(pooler, tokens)
            after = projector.contract(pooler(tokens, relevance, projector.expand).features)
            before = pooler(tokens, relevance, lambda x: projector.contract(projector.expand(x)))
            torch.testing.assert_close(after, before.features)
            with torch.no_grad():  # in chunks
                chunks = pooler(tokens, relevance, projector.expand).features
            torch.testing.assert_close(projector.contract(chunks), before.features)

    def test_tokens_of_equal_patches_are_equal_to_them(self, option, make):
        """The weights of a mean sum to 1. Layers that are trained may change the features."""
        pooler = make("pooler", option)
        if any(weights.requires_grad for weights in pooler.parameters()):
            return
        for grid in grids_of(pooler):
            tokens = draw(grid)
            ones = replace(tokens, features=torch.ones_like(tokens.features))
            pooled = pooler(ones, relevance_of(pooler, tokens))
            torch.testing.assert_close(pooled.features, torch.ones_like(pooled.features))

    def test_a_token_stands_at_the_centre_of_what_it_was_made_of(self, option, make):
        """Also with another prompt: it may choose patches, but it moves no token."""
        pooler = make("pooler", option)
        for grid in grids_of(pooler):
            tokens = draw(grid, WIDTH)
            tokens.features.requires_grad_()
            for seed in (1, 2):
                pooled = pooler(tokens, relevance_of(pooler, tokens, seed))
                for number in some(len(pooled), 8):
                    shares_of(tokens, pooled, number)

    def test_a_prompt_does_not_move_a_token_of_the_same_patches(self, option, make):
        pooler = make("pooler", option)
        if not pooler.uses_prompt:
            return
        tokens = draw(grids_of(pooler)[0])
        relevance = relevance_of(pooler, tokens)
        # The order of the patches stays, so that the same ones are kept; their weights change.
        places = [pooler(tokens, relevance * scale).layout.coordinates for scale in (1.0, 0.5)]
        assert torch.equal(*places)

    def test_the_features_depend_on_the_prompt_for_autograd(self, option, make):
        """With a gradient of 0 at least; without one, DDP waits for ever."""
        pooler = make("pooler", option)
        if not pooler.uses_prompt:
            return
        tokens = draw(grids_of(pooler)[0])
        relevance = relevance_of(pooler, tokens).requires_grad_()
        pooler(tokens, relevance).features.sum().backward()
        assert relevance.grad is not None

    def test_half_precision_is_kept(self, option, make):
        pooler = make("pooler", option).to(torch.bfloat16)
        tokens = draw(grids_of(pooler)[0])
        half = replace(tokens, features=tokens.features.bfloat16())
        pooled = pooler(half, relevance_of(pooler, tokens))
        assert pooled.features.dtype == torch.bfloat16
        assert pooled.layout.coordinates.dtype == torch.float32

    def test_coordinates_lie_on_the_extent_in_reading_order(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(pooler):
            tokens = draw(grid)
            layout = pooler(tokens, relevance_of(pooler, tokens)).layout
            assert (layout.coordinates >= 0).all()
            assert (layout.coordinates <= torch.tensor(grid) - 1).all()
            assert (layout.number.diff() >= 0).all()
            if not pooler.regular:
                continue
            by_grid = layout.coordinates.view(*pooler.extent(grid), 3)
            for axis in range(3):
                steps = by_grid.diff(dim=axis)
                assert (steps[..., axis] > 0).all()
                others = [other for other in range(3) if other != axis]
                assert (steps[..., others] == 0).all()

    def test_reindex_numbers_the_reduced_grid(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(pooler):
            tokens = draw(grid)
            pooled = pooler(tokens, relevance_of(pooler, tokens))
            again = pooled.reindex()
            assert again.features is pooled.features
            assert again.layout.extent == pooled.grid
            assert torch.equal(again.layout.number, torch.arange(len(pooled)).float())
            # Time is not renumbered: a reduced step has the time of its first token, which in a
            # window is the middle of the window.
            first = slice(None, None, pooled.grid.h * pooled.grid.w)
            shown = pooled.layout.shown_at
            torch.testing.assert_close(again.layout.shown_at[first], (shown - shown[0])[first])


#: Schemes that round seconds to whole positions, so that means are not kept.
ROUNDED = ("qwen2_5_vl",)


@pytest.mark.parametrize("rotary", options("rotary"))
@pytest.mark.parametrize("option", options("pooler"))
def test_keep_is_the_positions_of_the_patches(option, rotary, make):
    """A pooled token has the mean position of its patches, and text does not move."""
    pooler, scheme = make("pooler", option), make("rotary", rotary)
    assert isinstance(scheme, RotaryScheme)
    for grid in grids_of(pooler)[:3]:
        tokens = draw(grid, WIDTH)
        tokens.features.requires_grad_()
        pooled = pooler(tokens, relevance_of(pooler, tokens))
        before, after = scheme.place(tokens.layout, 7.0)
        if rotary in ROUNDED:
            assert scheme.place(pooled.layout, 7.0)[1] == after
            continue
        kept, after_kept = scheme.place(pooled.layout, 7.0)
        for number in some(len(pooled), 3):
            share = shares_of(tokens, pooled, number)
            torch.testing.assert_close(kept[:, number], before @ share, rtol=1e-5, atol=1e-4)
        assert after_kept == after
        reindexed = scheme.place(pooled.reindex().layout, 7.0)
        plain_grid = scheme.place(Layout.full(pooler.extent(grid)), 7.0)
        assert torch.equal(reindexed[0], plain_grid[0])
        assert reindexed[1] == plain_grid[1]


@pytest.mark.parametrize("option", options("encoder"))
class TestEncoder:
    @torch.no_grad()
    def test_extent_tells_the_grid(self, option, make):
        encoder = make("encoder", option).eval()
        for frames in (1, 2, 5):
            visual = Visual(torch.zeros(frames, 3, 64, 64, dtype=torch.uint8))
            (tokens,) = encoder([visual])
            assert tokens.grid == tokens.layout.extent == encoder.extent(frames, 64, 64)
            assert tokens.features.shape == (tokens.grid.size, encoder.width)
            assert torch.equal(tokens.layout.number, torch.arange(len(tokens)).float())

    @torch.no_grad()
    def test_what_is_known_of_a_visual_is_handed_on(self, option, make):
        encoder = make("encoder", option).eval()
        per_step = encoder.frames_per_step
        # A time step is shown when its first frame is.
        times = (0.5, 2.5) if per_step == 1 else (0.5, 1.0, 2.5)
        info = VisualInfo(seconds=times, draw=0.25, continues=True)
        frames = torch.zeros(len(times), 3, 64, 64, dtype=torch.uint8)
        (tokens,) = encoder([Visual(frames, info)])
        layout = tokens.layout
        assert (layout.seconds, layout.draw, layout.continues) == ((0.5, 2.5), 0.25, True)
        assert layout.shown_at.unique().tolist() == [0.0, 2.0]

    @torch.no_grad()
    def test_one_visual_alone_is_as_in_a_batch(self, option, make):
        encoder = make("encoder", option).eval()
        frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
        visuals = [Visual(part) for part in frames.split([3, 1, 2])]
        for together, visual in zip(encoder(visuals), visuals, strict=True):
            (alone,) = encoder([visual])
            torch.testing.assert_close(together.features, alone.features, atol=1e-5, rtol=0)

    @torch.no_grad()
    def test_the_blank_visual_can_be_read(self, option, make):
        encoder = make("encoder", option).eval()
        blank = encoder.blank()
        (tokens,) = encoder([blank])
        frames, _, height, width = blank.frames.shape
        assert tokens.grid == encoder.extent(frames, height, width)
