"""Images in tiles, and batches of all kinds of visuals."""

import json
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities import move_data_to_device
from PIL import Image

from datamodules.batch import Grid, Tiles, Visual, VisualInfo
from datamodules.instruct import collate, decode_sample
from datamodules.sample.conversation import ConversationEncoder
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video, write_shards
from datamodules.visuals.frames import FrameReader, UniformSampler
from datamodules.visuals.tiles import best_grid, cut_tiles
from experiments.run.compose import plain
from lightning_modules.distributed.blank import always_encode
from lightning_modules.model import VideoLanguageModel
from lightning_modules.pooler.average import AveragePooler
from lightning_modules.splice.tiles import edges, join_tiles, split_tiles, trim
from lightning_modules.tokens import VisualTokens, grid_coordinates
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.mixed import ROTARY, WIDE, make_tiled_model, mixed_batch, rows_of
from tests.helpers.visuals import outline, row_of

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
SIZES = [(40, 100), (150, 60), (64, 64), (32, 96), (5, 3), (33, 97), (100, 22), (300, 22)]


@pytest.mark.parametrize("grids", [[], [[1]], [[0, 2]], [[1, 2, 3]]])
def test_grids_that_are_none(grids):
    with pytest.raises(ValueError, match=r"data\.frames\.tiles"):
        FrameReader(32, UniformSampler(2), tiles=grids)


@pytest.mark.parametrize("size", SIZES)
def test_edges_are_where_no_picture_is(size):
    """The model removes the black padding of the data: no part of a white picture is lost."""
    frames, tiles = cut_tiles(Image.new("RGB", size, "white"), 32, GRIDS)
    assert (tiles.height, tiles.width) == size[::-1]
    assert (tiles.rows, tiles.columns) == best_grid(*size[::-1], 32, GRIDS)
    assert frames.shape == (1 + tiles.rows * tiles.columns, 3, 32, 32)
    assert (frames[0] == 255).all()
    plane = frames[1:].unflatten(0, tiles[:2]).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
    rows, columns = edges(tiles, *plane.shape[1:])
    # The data rounds the picture's size up, the model rounds it down: one line of pixels per side.
    inner = plane[:, rows + 1 : plane.shape[1] - rows - 1, columns + 1 : -columns - 1]
    assert not plane[:, : max(rows - 1, 0)].any()
    assert not plane[..., : max(columns - 1, 0)].any()
    assert (inner == 255).all()


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_pooled_edges_go_and_no_picture_does(size, kernel):
    rows, columns = best_grid(*size[::-1], 32, GRIDS)
    tiles = Tiles(rows, columns, *size[::-1])
    plane = torch.zeros(1, 4 * rows, 4 * columns, 1)
    top, left = edges(tiles, *plane.shape[1:3])
    plane[:, top : plane.shape[1] - top, left : plane.shape[2] - left] = 1
    pooled = AveragePooler(kernel=[1, kernel, kernel])(VisualTokens.on_grid(plane))
    kept = trim(pooled, tiles, None)
    assert (kept.features > 0).all()
    assert kept.features.sum() == pooled.features.sum()
    inner = Grid(1, plane.shape[1] - 2 * top, plane.shape[2] - 2 * left)
    assert kept.layout.extent == inner
    assert (kept.layout.coordinates >= 0).all()
    assert (kept.layout.coordinates <= torch.tensor(inner) - 1).all()
    if kernel == 1:
        assert torch.equal(kept.layout.coordinates, grid_coordinates(inner))
    marked = trim(pooled, tiles, torch.tensor([7.0]))
    assert torch.equal(marked.as_grid()[:, :, :-1], kept.as_grid())
    assert (marked.as_grid()[:, :, -1] == 7).all()
    places = marked.layout.coordinates.view(*marked.grid, 3)
    assert torch.equal(places[:, :, :-1].flatten(0, 2), kept.layout.coordinates)
    assert torch.equal(places[:, :, -1, :2], places[:, :, 0, :2])
    assert (places[:, :, -1, 2] == inner.w).all()  # behind the last column of patches
    assert marked.layout.extent == inner._replace(w=inner.w + 1)


def raw_sample(**members):
    turns = [
        {"from": "human", "value": "<image><video><image>What?"},
        {"from": "gpt", "value": "x"},
    ]
    text = json.dumps({"conversations": turns}).encode()
    return {"__url__": "s", "__key__": "k", "json": text, **members}


def test_from_bytes_to_a_batch():
    wide = encode_image(draw_frames(1, 1)[0][0].resize((90, 30)))
    tall = encode_image(draw_frames(2, 1)[0][0].resize((30, 60)))
    raw = raw_sample(**{"0.jpg": wide, "1.mp4": encode_video(draw_frames(3, 8)[0]), "2.jpg": tall})
    frames = FrameReader(32, UniformSampler(4), tiles=GRIDS)
    sample = decode_sample(raw, frames, ConversationEncoder())
    batch = collate([sample, sample], pad_id=0, prompt_pad_id=0)
    assert [shape[0] for shape in batch.shapes] == 2 * [4, 4, 3]
    tiles = [info.tiles for info in batch.infos]
    assert tiles == 2 * [Tiles(1, 3, 30, 90), None, Tiles(2, 1, 60, 30)]
    counts = [len(visual.frames) for visual in split_tiles(batch.visuals)]
    assert counts == 2 * [1, 1, 1, 1, 4, 1, 1, 1]
    assert batch.first(1).infos == batch.infos[:3]
    assert batch.questions().infos == batch.infos
    assert move_data_to_device(batch, "meta").infos == batch.infos
    plain_frames = FrameReader(32, UniformSampler(4))
    untiled = decode_sample(raw, plain_frames, ConversationEncoder())
    assert [visual.info.tiles for visual in untiled.visuals] == [None, None, None]
    assert torch.equal(untiled.visuals[0].frames, sample.visuals[0].frames[:1])


def test_visuals_behind_the_question_go_with_their_tiles():
    batch = mixed_batch()
    batch.labels[0] = batch.input_ids[0].clamp(min=0)  # the first row is all answer
    asked = batch.questions()
    assert asked.infos == batch.infos[1:]
    assert asked.shapes == batch.shapes[1:]


def test_frames_must_be_as_many_as_tiles():
    batch = mixed_batch()
    with pytest.raises(
        ValueError, match="2 x 2 tiles and a thumbnail has 5 frames, but 1 are given"
    ):
        replace(batch, infos=[VisualInfo(tiles=Tiles(2, 2, 9, 9)), *batch.infos[1:]])


@pytest.mark.parametrize("pooler", ["prompt_guided", "none"])
@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_each_sample_alone_is_as_in_the_batch(rotary, pooler):
    """One image, several, tiles, videos, only text, and all of them in turn."""
    model = make_tiled_model(rotary=rotary, pooler=pooler)
    batch = mixed_batch()
    together = model(batch)
    for i, row in enumerate(rows_of(batch)):
        alone = model(row)
        assert outline(alone.inputs.segments[0]) == outline(together.inputs.segments[i])
        length = alone.hidden.shape[1]
        ours, theirs = (model.llm.head(h) for h in (together.hidden[i, :length], alone.hidden[0]))
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@torch.no_grad()
def test_generation_alone_is_as_in_the_batch():
    model = make_tiled_model(rotary="mrope", pooler="prompt_guided")
    batch = mixed_batch()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, **options)
    for new, row in zip(together, rows_of(batch), strict=True):
        assert new.tolist() == model.generate(row, **options)[0].tolist()


@torch.no_grad()
def test_a_slot_holds_the_thumbnail_and_then_the_plane():
    model, batch = make_tiled_model(pooler="average"), mixed_batch()
    rows = [outline(row) for row in model(batch).inputs.segments]
    # 50 x 20 pixels fill all 8 columns of patches and the middle 4 of 4 rows, 40 x 90 the middle
    # 4 of 4 columns and all 8 rows; windows are 2 x 2 patches.
    image, wide, tall = Grid(1, 2, 2), Grid(1, 2, 4 + 1), Grid(1, 4, 2 + 1)
    assert rows[2] == outline(row_of(1, image, wide, 3))
    assert rows[4] == [3]
    assert rows[6] == outline(row_of(image, tall, 1, image, 1, image, wide, 2))
    unmarked = make_tiled_model(pooler="average", newline=False)
    assert unmarked.image_newline is None
    row = unmarked(batch).inputs.segments[2]
    assert outline(row) == outline(row_of(1, image, Grid(1, 2, 4), 3))


@pytest.mark.parametrize("pooler", ["prompt_guided", "average"])
def test_a_training_step_reaches_every_weight(pooler):
    model = make_tiled_model(pooler=pooler).train()
    model(mixed_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("row", [0, 4])
def test_the_newline_has_a_gradient_without_tiles_too(row):
    """Ranks reduce gradients together: a rank whose batch has no tiles gives zeros."""
    model = make_tiled_model(pooler="prompt_guided").train()
    always_encode(model.encoder)  # as in training
    model(list(rows_of(mixed_batch()))[row]).loss.backward()
    assert model.image_newline.grad is not None
    assert not model.image_newline.grad.any()


@torch.no_grad()
def test_a_tile_has_no_neighbours_in_time():
    adapter = {"depth": 2, "max_frames": 8}
    encoder = make_tiled_model(bt_adapter=adapter).encoder
    batch = list(rows_of(mixed_batch()))[2]
    frames = batch.visuals[0].frames
    together = torch.cat([t.as_grid().flatten(1, 2) for t in encoder(split_tiles(batch.visuals))])
    alone = torch.cat([encoder.encode(frame[None], [1]) for frame in frames])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    as_video = encoder.encode(frames, [len(frames)])
    assert not torch.allclose(as_video, alone, atol=1e-3)


def test_tiles_for_a_model_without_are_refused():
    with pytest.raises(ValueError, match="tiles=llava_next"):
        make_tiled_model(tiles=None)(mixed_batch())


@torch.no_grad()
def test_the_newline_is_saved_and_loaded(tmp_path):
    model, batch = make_tiled_model(), mixed_batch()
    model.save_pretrained(tmp_path)
    again, report = VideoLanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert again.config.tiles == {"newline": True}
    assert torch.equal(again.eval()(batch).hidden, model(batch).hidden)


def test_one_word_sets_both_sides(compose, tmp_path):
    config = compose(["tiles=llava_next"], tmp_path)
    assert instantiate(config.data.frames, _convert_="all").tiles == GRIDS
    module = VideoLLMModule(plain(config.model), optimizer=list)
    assert module.network.image_newline.shape == (192,)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["stages"]["tiles"] == {"newline": True}
    plain_config = compose([], tmp_path)
    assert plain_config.data.frames.tiles is None
    untiled = VideoLLMModule(plain(plain_config.model), optimizer=list)
    with pytest.raises(
        ValueError, match=r"trained with tiles \{'newline': True\}, this run has None"
    ):
        untiled.on_load_checkpoint(checkpoint)


def test_from_shards_to_a_loss_by_the_shipped_settings(compose, tmp_path):
    write_shards(tmp_path / "shards", [12])
    sizes = ["data.batch_size=6", "data.global_batch_size=6", "data.stream.num_workers=0"]
    words = ["tiles=llava_next", f"data.train={tmp_path / 'shards'}", "data.frames.image_size=64"]
    config = compose([*words, *sizes, "data.frames.sampler.num_frames=2"], tmp_path)
    module = VideoLLMModule(plain(config.model), optimizer=list)
    cut = 0
    for batch in instantiate(config.data, _convert_="all").train_dataloader():
        loss = module.network(batch).loss
        loss.backward()
        assert loss.isfinite()
        cut += sum(info.tiles is not None for info in batch.infos)
    assert cut
    assert module.network.image_newline.grad.any()


def test_tiles_and_thumbnail_hand_on_what_is_known_of_their_visual():
    """A draw is that of all pieces; only the first piece can continue another visual."""
    frames = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    info = VisualInfo(tiles=WIDE, draw=0.25, continues=True)
    parts = split_tiles([Visual(frames, info)])
    assert [part.info.draw for part in parts] == [0.25] * 3
    assert [part.info.continues for part in parts] == [True, False, False]
    model = make_tiled_model()
    batch = list(rows_of(mixed_batch()))[2]
    batch = replace(batch, infos=[info])
    thumbnail, plane = (
        piece.tokens.layout
        for piece in join_tiles(batch, model.encoder(split_tiles(batch.visuals)))
    )
    assert (thumbnail.draw, plane.draw) == (0.25, 0.25)
    assert (thumbnail.continues, plane.continues) == (True, False)
