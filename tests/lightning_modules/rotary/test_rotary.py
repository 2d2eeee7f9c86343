"""The contract of every scheme in configs/rotary, and the positions of each in one row."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from datamodules.batch import Grid
from experiments import CONFIG_DIR
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.rotary.base import HEIGHT, STILL, TIME, WIDTH, RotaryEmbedding
from lightning_modules.rotary.hope import HopeRope
from lightning_modules.rotary.mrope import MRope
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.spec import build
from lightning_modules.tokens import Layout
from tests.helpers.visuals import row_of

OPTIONS = sorted(path.stem for path in (CONFIG_DIR / "rotary").glob("*.yaml"))

#: Positions of [2, Grid(2, 1, 2), 1], from each scheme's formula by hand: time, height, width.
ROWS = {
    "vanilla": [[0, 1, 2, 3, 4, 5, 6]],
    "tad": [[0, 2, 4, 5, 7, 8, 10]],
    "mrope": [[0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 3, 2, 3, 4]],
    "videorope": [[0, 1, 2, 2, 4, 4, 5], [0, 1, 2, 2, 4, 4, 5], [0, 1, 2, 3, 4, 5, 5]],
    "hope": [
        [0, 1, 2, 2, 3.5, 3.5, 4.5],
        [0, 1, 2, 2, 3.5, 3.5, 4.5],
        [0, 1, 2, 3, 3.5, 4.5, 4.5],
    ],
    # Without seconds, one second lies between two time steps, which is 2 positions.
    "qwen2_5_vl": [[0, 1, 2, 2, 4, 4, 5], [0, 1, 2, 2, 2, 2, 5], [0, 1, 2, 3, 2, 3, 5]],
    "vrope": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 3, 2, 5, 4, 6]] * 2,
}
LAYOUT = row_of(3, Grid(4, 2, 3), 2, Grid(1, 2, 2), 5)
LENGTH = 3 + 24 + 2 + 4 + 5
#: The same number of tokens: a row that ends with a long video, and one with a wide image inside.
ENDING_WITH_VISUALS = [
    row_of(1, Grid(1, 1, 1), Grid(6, 3, 2)),
    row_of(2, Grid(1, 2, 2), Grid(1, 2, 16)),
]


def load(option, **fields):
    return build({**OmegaConf.load(CONFIG_DIR / "rotary" / f"{option}.yaml"), **fields})


def make_llm(scheme, model_type="qwen2", **fields):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,  # so that attention is not nearly uniform
    }
    llm = CausalLM(config={"model_type": model_type, **sizes, **fields}).eval()
    if scheme is not None:
        llm.replace_rotary(lambda original: RotaryEmbedding(scheme, original))
    return llm


def test_every_option_has_its_row():
    assert sorted(ROWS) == OPTIONS


@pytest.mark.parametrize("option", OPTIONS)
class TestContract:
    def test_row(self, option):
        assert load(option).positions(row_of(2, Grid(2, 1, 2), 1))[0].tolist() == ROWS[option]

    def test_shapes(self, option):
        scheme = load(option)
        assert scheme.positions(LAYOUT)[0].shape == (scheme.num_axes, LENGTH)
        assert scheme.positions([])[0].shape == (scheme.num_axes, 0)
        assert scheme.axes(16).shape == (16,)
        assert set(scheme.axes(16).tolist()) <= {STILL, *range(scheme.num_axes)}

    def test_text_alone_is_rope(self, option):
        """All axes advance together, in steps of `text_step`."""
        scheme = load(option)
        expected = scheme.text_step * torch.arange(9.0)
        positions, following = scheme.positions([9])
        assert torch.equal(positions, expected.expand(scheme.num_axes, -1))
        assert following == 9 * scheme.text_step

    def test_positions_only_shift_with_what_stands_before(self, option):
        scheme = load(option)
        rest = row_of(Grid(3, 2, 2), 4, Grid(2, 2, 2), 1)
        (near, next_near), (far, next_far) = (scheme.positions([n, *rest]) for n in (2, 7))
        shift = 5 * scheme.text_step
        assert torch.equal(far[:, 7:], near[:, 2:] + shift)
        assert next_far == next_near + shift

    def test_kept_tokens_stand_where_they_stood(self, option):
        """A subset of the tokens gets the same subset of the positions. Text does not move."""
        scheme, whole = load(option), Layout.full(Grid(4, 3, 5))
        part = torch.tensor([0, 7, 13, 14, 33, 59])
        kept = replace(whole, coordinates=whole.coordinates[part])
        (all_positions, after), (positions, after_kept) = (
            scheme.place(layout, 5.0) for layout in (whole, kept)
        )
        assert torch.equal(positions, all_positions[:, part])
        assert after_kept == after

    def test_a_mean_of_tokens_stands_at_the_mean(self, option):
        """Every scheme in configs/rotary is affine in the coordinates."""
        scheme, whole = load(option), Layout.full(Grid(4, 3, 5))
        pairs = whole.coordinates.view(2, 2, 15, 3).mean(1).flatten(0, 1)
        positions = scheme.place(whole, 5.0)[0].unflatten(1, (2, 2, 15)).mean(2).flatten(1)
        assert torch.equal(scheme.place(replace(whole, coordinates=pairs), 5.0)[0], positions)

    def test_one_token(self, option):
        positions, after = load(option).place(Layout.full(Grid(1, 1, 1)), 3.0)
        assert positions.tolist() == [[3.0]] * load(option).num_axes
        assert after == 3.0 + load(option).text_step

    def test_padding(self, option):
        scheme = load(option)
        both = [LAYOUT, [4]]
        right = scheme.batch_positions(both)
        left = scheme.batch_positions(both, padding_side="left")
        assert right.shape == left.shape == (1 + scheme.num_axes, 2, LENGTH)
        assert torch.equal(right[:, 1, :4], left[:, 1, -4:])
        assert torch.equal(right[0, 0], torch.arange(LENGTH).float())
        assert torch.equal(right[1:, 0] * scheme.text_step, scheme.positions(LAYOUT)[0])

    @pytest.mark.parametrize("layouts", [[LAYOUT, LAYOUT], ENDING_WITH_VISUALS])
    @torch.no_grad()
    def test_cached_decoding_equals_the_full_forward(self, option, layouts):
        """Also if a row ends with a visual: only the scheme knows the next position."""
        scheme = load(option)
        llm = make_llm(scheme)
        embeds = torch.randn(2, LENGTH, 64)
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        start = scheme.batch_positions(layouts), scheme.batch_following(layouts)
        grown = scheme.batch_positions([[*layout, 6] for layout in layouts])
        seen, embedding = [], llm.decoder.rotary_emb
        embedding.register_forward_hook(lambda *_: seen.append(embedding.axis_positions))
        new = llm.generate(embeds, mask, *start, **options)
        # The last generated token is never read.
        assert torch.equal(torch.cat(seen, dim=-1), grown[1:, :, :-1])
        whole = torch.cat([embeds, llm.embed(new)], dim=1)
        logits = llm.head(llm(whole, torch.ones(2, LENGTH + 6, dtype=torch.bool), grown))
        assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), new)

    @torch.no_grad()
    def test_padded_equals_unpadded(self, option):
        scheme = load(option)
        llm = make_llm(scheme)
        row = torch.randn(1, 4, 64)
        alone = llm(row, None, scheme.batch_positions([[4]]))
        for side, span in (("left", slice(LENGTH - 4, LENGTH)), ("right", slice(4))):
            embeds = torch.randn(2, LENGTH, 64)
            mask = torch.ones(2, LENGTH, dtype=torch.bool)
            mask[1] = False
            embeds[1, span], mask[1, span] = row[0], True
            padded = llm(embeds, mask, scheme.batch_positions([LAYOUT, [4]], side))
            torch.testing.assert_close(padded[1, span], alone[0], atol=1e-5, rtol=0)

    def test_training_without_mask_has_gradients(self, option):
        scheme = load(option)
        llm = make_llm(scheme)
        embeds = torch.randn(1, LENGTH, 64, requires_grad=True)
        llm(embeds, None, scheme.batch_positions([LAYOUT])).sum().backward()
        assert embeds.grad is not None
        assert embeds.grad.isfinite().all()


@torch.no_grad()
def test_the_swap_has_an_effect_and_all_schemes_differ():
    embeds = torch.randn(1, LENGTH, 64)
    outputs = []
    for option in OPTIONS:
        scheme = load(option)
        outputs.append(make_llm(scheme)(embeds, None, scheme.batch_positions([LAYOUT])))
    for i, a in enumerate(outputs):
        for b in outputs[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "qwen3"])
@torch.no_grad()
def test_vanilla_is_the_llm_as_it_was(model_type):
    embeds = torch.randn(2, 7, 64)
    scheme = load("vanilla")
    positions = scheme.batch_positions([[7]] * 2)
    ours = make_llm(scheme, model_type, head_dim=32)(embeds, None, positions)
    stock = make_llm(None, model_type, head_dim=32).lm.get_decoder()(inputs_embeds=embeds)
    assert torch.equal(ours, stock.last_hidden_state)


@torch.no_grad()
def test_schemes_in_one_process_do_not_disturb_each_other():
    """The published code rebinds a global, so M-RoPE then runs with VideoRoPE's frequencies."""
    embeds = torch.randn(1, LENGTH, 64)

    def run(llm, scheme):
        return llm(embeds, None, scheme.batch_positions([LAYOUT]))

    schemes = [load(option) for option in OPTIONS]
    llms = [make_llm(scheme) for scheme in schemes]
    first = [run(llm, scheme) for llm, scheme in zip(llms, schemes, strict=True)]
    again = [run(llm, scheme) for llm, scheme in zip(llms[::-1], schemes[::-1], strict=True)]
    for a, b in zip(first, again[::-1], strict=True):
        assert torch.equal(a, b)


def test_videorope_without_its_parts_is_mrope():
    bare = VideoRope(low_frequency_temporal=False, diagonal_layout=False, temporal_spacing=1.0)
    assert torch.equal(bare.positions(LAYOUT)[0], MRope().positions(LAYOUT)[0])
    assert torch.equal(bare.axes(64), MRope().axes(64))


def test_the_papers_ablation_is_three_fields():
    """Each part changes what its definition says, and nothing else."""
    base = {"low_frequency_temporal": False, "diagonal_layout": False, "temporal_spacing": 1.0}
    mrope = VideoRope(**base)
    diagonal = VideoRope(**{**base, "diagonal_layout": True})
    slow = VideoRope(**{**base, "low_frequency_temporal": True})
    spaced = VideoRope(**{**base, "temporal_spacing": 2.0})
    video = Layout.full(Grid(3, 2, 2))

    def place(scheme, start):
        return scheme.place(video, start)[0]

    assert torch.equal(diagonal.axes(64), mrope.axes(64))
    assert torch.equal(place(diagonal, 5.0)[TIME], place(mrope, 5.0)[TIME])
    assert torch.equal(place(slow, 5.0), place(mrope, 5.0))
    assert slow.axes(64).tolist() == [HEIGHT, WIDTH] * 24 + [TIME] * 16  # eq. 6, head size 128
    assert mrope.axes(64).tolist() == [TIME] * 16 + [HEIGHT] * 24 + [WIDTH] * 24  # eq. 4
    assert torch.equal(place(spaced, 0.0)[TIME], 2 * place(mrope, 0.0)[TIME])
    assert torch.equal(place(spaced, 0.0)[1:], place(mrope, 0.0)[1:])


def test_diagonal_layout_is_symmetric():
    """The middle of an odd frame has its time as position on all axes (eq. 7)."""
    placed = VideoRope().place(Layout.full(Grid(4, 3, 5)), 10.0)[0].unflatten(1, (4, 3, 5))
    assert torch.equal(placed[:, :, 1, 2], (10 + 2 * torch.arange(4.0)).expand(3, -1))


@pytest.mark.parametrize("option", ["mrope", "videorope"])
def test_sections_that_do_not_fill_a_head(option):
    for sections, frequencies in ((None, 12), ([2, 3, 4], 16), ([16, 0], 16), ([-1, 8, 9], 16)):
        scheme = load(option, sections=sections)
        with pytest.raises(ValueError, match=r"model\.rotary\.sections"):
            scheme.axes(frequencies)
    with pytest.raises(ValueError, match=r"model\.rotary\.sections"):
        make_llm(load(option, sections=[1, 1, 1]))


def test_alternating_needs_equal_sections():
    with pytest.raises(ValueError, match="alternates height and width"):
        VideoRope(sections=[4, 5, 7]).axes(16)


@pytest.fixture
def bfloat16():
    """The default dtype inside a step of `trainer.precision=bf16-true`."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("option", OPTIONS)
def test_positions_do_not_depend_on_the_default_dtype(option, bfloat16):
    """Above 256, bfloat16 has no odd numbers: generation would begin one token too early."""
    scheme = load(option)
    row = row_of(601, Grid(3, 2, 2), 37)
    positions, following = scheme.positions(row)
    assert positions.dtype == torch.float32
    assert scheme.batch_following([row]).tolist() == [following / scheme.text_step]
    assert following == positions[0, -1].item() + scheme.text_step


def test_times_do_not_depend_on_the_default_dtype_or_on_the_start(bfloat16):
    layout = Layout.full(Grid(4, 1, 1), tuple(36000 + 0.04 * n for n in range(4)))
    expected = torch.tensor([0.0, 0.04, 0.08, 0.12], dtype=torch.float32)
    torch.testing.assert_close(layout.shown_at, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_angles_stay_float32_in_bf16():
    """bfloat16 holds neither 1000.5 nor the frequencies. Half-precision modules try both."""
    scheme = VideoRope(temporal_spacing=0.5)
    embedding = make_llm(scheme).decoder.rotary_emb
    embedding.to(torch.bfloat16)
    positions = scheme.batch_positions([row_of(1000, Grid(4, 2, 2), 8)])
    embedding.axis_positions = positions[1:]
    x = torch.zeros(1, positions.shape[-1], 64)
    cos, _ = embedding(x, positions[0].long())
    exact = make_llm(scheme).decoder.rotary_emb
    exact.axis_positions = positions[1:]
    assert torch.equal(cos, exact(x, positions[0].long())[0])
    half, _ = embedding(x.bfloat16(), positions[0].long())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, cos.bfloat16())
    angle = 1000.5 * embedding.frequencies(torch.device("cpu"), 0)[0]
    read = scheme.axes(16) == TIME
    torch.testing.assert_close(cos[0, 1004, :16][read], angle[read].cos(), atol=1e-6, rtol=0)
    assert list(embedding.buffers()) == []


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)
@torch.no_grad()
def test_frequency_scaling_is_the_llms_own(scaling):
    """For every scheme, text must equal the stock model's with the same scaling."""
    fields = {"rope_parameters": {"rope_theta": 1e4, **scaling}, "max_position_embeddings": 16}
    embeds = torch.randn(1, 40, 64)
    scheme = VideoRope()
    ours = make_llm(scheme, **fields)(embeds, None, scheme.batch_positions([[40]]))
    stock = make_llm(None, **fields).lm.get_decoder()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    plain = make_llm(scheme)(embeds, None, scheme.batch_positions([[40]]))
    assert (ours - plain).abs().max() > 1e-3


def test_a_draw_chooses_the_spacing_of_hope():
    """One of five, each a fifth of the range. Without a draw, it is the spacing of the config."""
    video = Layout.full(Grid(3, 2, 2))
    found = [
        HopeRope(temporal_spacing=9.0).place(replace(video, draw=draw), 0.0)[0][TIME].max().item()
        for draw in (0.0, 0.19, 0.2, 0.5, 0.7, 0.999, None)
    ]
    assert found == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 18.0]


def test_what_does_not_turn_does_not_turn_for_text_either():
    scheme = HopeRope()
    embedding = make_llm(scheme).decoder.rotary_emb
    cos, sin = embedding(torch.zeros(1, 9, 64), torch.arange(9)[None])
    still = scheme.axes(16) == STILL
    assert still.tolist() == [False] * 12 + [True] * 4
    assert (cos[0, :, :16][:, still] == 1).all()
    assert (sin[0, :, :16][:, still] == 0).all()
    assert (sin[0, 1:, :16][:, ~still] != 0).all()
