"""The token contract, for every option in configs/encoder, configs/pooler and configs/rotary."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from datamodules.batch import Grid, Visual, VisualInfo
from experiments import CONFIG_DIR
from experiments.run.compose import plain
from lightning_modules.pooler.base import Pooler
from lightning_modules.rotary.base import RotaryScheme
from lightning_modules.spec import build
from lightning_modules.tokens import Layout, VisualTokens


def options(component):
    return sorted(path.stem for path in (CONFIG_DIR / component).glob("*.yaml"))


#: Grids that every pooler reads: the encoder's own, one frame, an odd number of frames, one patch.
GRIDS = {
    "large": [Grid(4, 24, 24), Grid(1, 24, 24), Grid(5, 24, 24)],
    "tiny": [Grid(4, 4, 4), Grid(1, 4, 4), Grid(5, 4, 4)],
    "any": [Grid(3, 5, 7), Grid(1, 1, 1)],
}


def grids_of(option):
    if option == "none":
        return [grid for grids in GRIDS.values() for grid in grids]
    return GRIDS["tiny" if "2x2" in option else "large"]


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
            small = spec_of("encoder", "clip_tiny")["config"]
            spec = {**spec, "source": None, "config": small, "image_size": 64}
            spec |= {"context_length": None}
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


def relevance_of(pooler, tokens):
    if not pooler.uses_prompt:
        return None
    return torch.rand(len(tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("option", options("pooler"))
class TestPooler:
    def test_extent_is_the_grid_that_the_tokens_fill(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(option):
            tokens = draw(grid)
            pooled = pooler(tokens, relevance_of(pooler, tokens))
            assert isinstance(pooler, Pooler)
            assert pooled.grid == pooler.extent(grid)
            assert len(pooled) == len(pooled.layout) == pooled.grid.size
            assert pooled.layout.extent == grid
            assert pooler.width(6) == 6 == pooled.features.shape[1]

    def test_weights_of_a_mean_sum_to_1(self, option, make):
        """The projector's second layer runs after the pooler, which is correct only for means."""
        pooler = make("pooler", option)
        for grid in grids_of(option):
            tokens = draw(grid)
            ones = replace(tokens, features=torch.ones_like(tokens.features))
            pooled = pooler(ones, relevance_of(pooler, tokens))
            torch.testing.assert_close(pooled.features, torch.ones_like(pooled.features))

    def test_a_token_stands_at_the_middle_of_what_it_was_made_of(self, option, make):
        """A token's place is the mean of the patches that its gradient reaches."""
        pooler = make("pooler", option)
        for grid in grids_of(option):
            tokens = draw(grid)
            patches = tokens.features.requires_grad_()
            pooled = pooler(tokens, relevance_of(pooler, tokens))
            for number in {0, len(pooled) // 2, len(pooled) - 1}:
                (reached,) = torch.autograd.grad(
                    pooled.features[number].sum(), patches, retain_graph=True
                )
                members = tokens.layout.coordinates[reached.abs().sum(1) > 0]
                middle = (members.amin(0) + members.amax(0)) / 2
                torch.testing.assert_close(pooled.layout.coordinates[number], middle)

    def test_coordinates_lie_on_the_extent_in_reading_order(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(option):
            tokens = draw(grid)
            layout = pooler(tokens, relevance_of(pooler, tokens)).layout
            assert (layout.coordinates >= 0).all()
            assert (layout.coordinates <= torch.tensor(grid) - 1).all()
            by_grid = layout.coordinates.view(*pooler.extent(grid), 3)
            for axis in range(3):
                assert (by_grid.diff(dim=axis)[..., axis] > 0).all()

    def test_a_prompt_does_not_move_a_token(self, option, make):
        pooler = make("pooler", option)
        tokens = draw(grids_of(option)[0])
        other = relevance_of(pooler, tokens)
        first, second = (
            pooler(tokens, weights).layout.coordinates
            for weights in (other, None if other is None else 1 - other)
        )
        assert torch.equal(first, second)

    def test_reindex_numbers_the_reduced_grid(self, option, make):
        pooler = make("pooler", option)
        for grid in grids_of(option):
            tokens = draw(grid)
            pooled = pooler(tokens, relevance_of(pooler, tokens))
            again = pooled.reindex()
            assert again.features is pooled.features
            assert again.layout.extent == pooled.grid
            assert torch.equal(again.layout.number, torch.arange(len(pooled)).float())
            # Time is not renumbered: a reduced step has the time of the middle of its window.
            torch.testing.assert_close(
                again.layout.shown_at,
                pooled.layout.shown_at - pooled.layout.shown_at[0],
            )


@pytest.mark.parametrize("rotary", options("rotary"))
@pytest.mark.parametrize("option", options("pooler"))
def test_keep_is_the_positions_of_the_patches(option, rotary, make):
    """A pooled token has the mean position of its window, and text does not move."""
    pooler, scheme = make("pooler", option), make("rotary", rotary)
    assert isinstance(scheme, RotaryScheme)
    for grid in grids_of(option):
        tokens = draw(grid)
        before, after = scheme.place(tokens.layout, 7.0)
        # The axes become features, so the pooler itself takes the mean of each window's positions.
        axes = replace(tokens, features=before.mT)
        alike = None if not pooler.uses_prompt else torch.zeros(len(tokens))
        kept, after_kept = scheme.place(pooler(tokens, alike).layout, 7.0)
        torch.testing.assert_close(kept, pooler(axes, alike).features.mT, rtol=1e-5, atol=1e-4)
        assert after_kept == after
        reindexed = scheme.place(pooler(tokens, alike).reindex().layout, 7.0)
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
        info = VisualInfo(seconds=(0.5, 2.5), draw=0.25, continues=True)
        (tokens,) = encoder([Visual(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), info)])
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
