"""`positions=keep` and `reindex` in a whole model: tiles, videos, packed rows and generation."""

from dataclasses import replace

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, Tiles, VisualInfo
from lightning_modules.pooler.average import AveragePooler
from lightning_modules.splice.tiles import split_tiles
from tests.helpers.mixed import POOLERS, ROTARY, make_tiled_model, mixed_batch, rows_of
from tests.helpers.visuals import outline

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_kept_tokens_alone_padded_and_packed_are_alike(rotary, pooler):
    model = make_tiled_model(rotary=rotary, pooler=pooler, positions="keep")
    batch = mixed_batch()
    padded, packed = model(batch), model(batch, packing=200)
    assert len(packed.hidden) < len(batch)
    for i, row in enumerate(rows_of(batch)):
        alone = model(row)
        assert outline(alone.inputs.segments[0]) == outline(padded.inputs.segments[i])
        length = alone.hidden.shape[1]
        n, start, stop = packed.inputs.samples[i]
        for hidden in (padded.hidden[i, :length], packed.hidden[n, start:stop]):
            ours, theirs = model.llm.head(hidden), model.llm.head(alone.hidden[0])
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_generation_goes_on_where_the_visual_would_end_without_a_pooler(rotary):
    model = make_tiled_model(rotary=rotary, pooler="average", positions="keep")
    batch = mixed_batch().questions()
    new = model.generate(batch, **OPTIONS)
    for i, row in enumerate(rows_of(batch)):
        assert new[i].tolist() == model.generate(row, **OPTIONS)[0].tolist()
        inputs = model.compose(row, model.encoder(split_tiles(row.visuals)))
        (following,) = model.rotary.batch_following(inputs.segments)
        unpooled = make_tiled_model(rotary=rotary, pooler="none")
        whole = unpooled.compose(row, unpooled.encoder(split_tiles(row.visuals)))
        assert following == unpooled.rotary.batch_following(whole.segments)[0]


@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_text_does_not_move_with_what_is_pooled(rotary):
    """With keep, all poolers give a text token the same position; with reindex they do not."""
    last = {}
    for positions in ("keep", "reindex"):
        for pooler in POOLERS:
            model = make_tiled_model(rotary=rotary, pooler=pooler, positions=positions)
            inputs = model(mixed_batch()).inputs
            ends = [int(mask.sum()) - 1 for mask in inputs.mask]
            last[positions, pooler] = [
                inputs.positions[1:, row, end].tolist() for row, end in enumerate(ends)
            ]
    assert last["keep", "average"] == last["keep", "prompt_guided"] == last["keep", "none"]
    assert last["reindex", "none"] == last["keep", "none"]
    assert last["reindex", "average"] != last["keep", "average"]


@torch.no_grad()
def test_of_a_video_the_positions_by_hand():
    """M-RoPE on 2 x 4 x 4 patches, pooled 2 x 2 x 2, after 1 text token."""
    batch = list(rows_of(mixed_batch()))[3]  # a video of 4 frames, then 5 text tokens
    inputs = make_tiled_model(rotary="mrope", pooler="average", positions="keep")(batch).inputs
    time, row, column = inputs.positions[1:, 0]
    assert time[:8].tolist() == [0.5] * 4 + [2.5] * 4
    assert row[:8].tolist() == [0.5, 0.5, 2.5, 2.5] * 2
    assert column[:8].tolist() == [0.5, 2.5] * 4
    assert time[8:].tolist() == [4, 5, 6, 7, 8]  # 4 frames of 4 x 4: the largest is 3
    again = make_tiled_model(rotary="mrope", pooler="average")(batch).inputs.positions[1, 0]
    assert again.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_padding_of_tiles_moves_nothing(rotary):
    """Without a pooler both words mean the same, also for a picture that leaves tiles empty."""
    batch = list(rows_of(mixed_batch()))[2]
    for tiles in (Tiles(1, 2, 10, 50), Tiles(1, 2, 50, 20)):
        batch = replace(batch, infos=[VisualInfo(tiles=tiles)])
        found = [
            make_tiled_model(rotary=rotary, pooler="none", positions=word)(batch).inputs.positions
            for word in ("keep", "reindex")
        ]
        assert torch.equal(*found)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"model\.positions is 'kept'; take reindex or keep"):
        make_tiled_model(positions="kept")


def test_tiles_need_tokens_in_rows_and_columns(monkeypatch):
    """A pooler whose tokens have none would lose the wrong ones with the padding."""
    monkeypatch.setattr(AveragePooler, "regular", False)
    with pytest.raises(ValueError, match="no rows and columns, by which"):
        make_tiled_model(pooler="average")
    make_tiled_model(pooler="average", tiles=None)


def test_a_training_step_with_kept_positions_reaches_every_weight():
    model = make_tiled_model(pooler="prompt_guided", positions="keep").train()
    output = model(mixed_batch())
    assert (output.inputs.labels != IGNORE_INDEX).any()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
