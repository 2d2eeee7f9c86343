"""Forecasts of every stage of training and kind of batch equal a real step."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, PreferenceBatch, Tiles
from datamodules.sample.outline import Outline
from experiments.planning.forecast import forecast, precision_of
from experiments.planning.largest_sample import Largest
from experiments.planning.memory_watch import local_piece
from experiments.planning.rehearsal import rehearse
from experiments.run.compose import build, plain
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.real_step import RealFrames, take_real
from tests.helpers.visuals import visuals_of

PROBE = [
    "experiment=resume_probe",
    "tokens=96",
    "model.llm.config.tie_word_embeddings=false",
    "model.llm.config.attention_dropout=0.0",
]
SMALL = ["model.encoder.image_size=32", "model.encoder.config.vision.patch_size=8"]
PAIRS = [
    "experiment=ppllava_dpo",
    "scale=tiny",
    *SMALL,
    "data.batch_size=2",
    "data.conversation.max_length=40",
    "model.llm.config.tie_word_embeddings=false",
]
CAPTIONS = [
    "experiment=clip_context",
    "scale=tiny",
    *SMALL,
    "data.batch_size=4",
    "data.global_batch_size=4",
]


@pytest.fixture(scope="module")
def composed(compose, tmp_path_factory):
    return lambda *words: compose(words, tmp_path_factory.mktemp("plan"), "plan")


def outline(visuals=(4,), tiles=None, words=10, learnt=3):
    frames = torch.zeros(sum(visuals), 3, 32, 32, dtype=torch.uint8)
    return Outline(visuals_of(frames, visuals, tiles or ()), words, learnt)


def test_a_batch_is_what_the_datamodule_makes(composed):
    batch = build(composed(*PROBE, "data.batch_size=2").data, "data").outlined(outline((4, 1)))
    assert batch.input_ids.tolist() == [[VISUAL_SLOT, VISUAL_SLOT, *[1] * 10]] * 2
    assert (batch.labels != IGNORE_INDEX).sum(1).tolist() == [3, 3]
    assert [shape[0] for shape in batch.shapes] == [4, 1, 4, 1]
    assert batch.prompt_ids.shape == (2, 77)


def test_pairs_share_their_frames(composed):
    batch = build(composed(*PAIRS).data, "data").outlined(outline())
    assert isinstance(batch, PreferenceBatch)
    assert batch.rejected.pixels is batch.chosen.pixels
    assert (len(batch), batch.reference.shape, batch.settings) == (2, (2, 2), [])


def test_captions_fill_the_text_tower(composed):
    data = build(composed(*CAPTIONS).data, "data")
    batch = data.outlined(outline((1,)))
    assert batch.input_ids.tolist() == [[VISUAL_SLOT]] * 4
    assert batch.prompt_mask.sum(1).tolist() == [248] * 4
    with pytest.raises(ValueError, match="2 visuals for one caption"):
        data.outlined(outline((1, 1)))


def test_a_batch_holds_what_the_budget_allows(composed):
    budget = ["max_tokens=100", "tokens_per_frame=3", "tokens_per_image=5"]
    words = [f"data.stream.{word}" for word in budget]
    config = composed(*PROBE, *words, "data.batch_size=6", "data.global_batch_size=6")
    data = build(config.data, "data")
    for visuals, tiles, samples in (
        ((4,), None, 4),  # 10 text tokens and 4 frames of 3 tokens: 22 of 100
        ((1,), None, 6),  # an image of 5 tokens: 15, in a batch of at most 6
        ((3, 1), [Tiles(1, 2, 20, 50), None], 5),  # two images, one of them in tiles: 20
        ((100,), None, 1),  # longer than any batch, so it is a batch of its own
    ):
        assert len(data.outlined(outline(visuals, tiles))) == samples


def test_contrast_is_refused_in_several_micro_batches_as_in_training(composed):
    config = composed(*CAPTIONS, "data.batch_size=2")
    with pytest.raises(ValueError, match=r"on 1 ranks makes 2 micro-batches .*data\.batch_size=4"):
        forecast(config, 1)


STEPS = {
    "pairs, frozen copy": [*PAIRS, "data.global_batch_size=4"],
    "pairs, streamed": [*PAIRS, "data.global_batch_size=4", "module/reference=streamed"],
    "pairs, base weights": [
        *PAIRS,
        "data.global_batch_size=4",
        "module/reference=base",
        "tuning=lora",
        "tuning.lora.dropout=0.0",
        "tuning.freeze=[encoder,projector]",
    ],
    "captions": [*CAPTIONS, "videos=0", "images=1"],
    "tiles": [*PROBE, "tokens=300", "tiles=llava_next", "videos=1", "images=1"],
    "packed": [*PROBE, "module.packing=200", "data.batch_size=4"],
    "budget": [
        *PROBE,
        "data.stream.max_tokens=300",
        "data.stream.tokens_per_frame=4",
        "data.batch_size=4",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_every_kind_of_step_takes_what_is_planned(kind, composed):
    config = composed(*STEPS[kind])
    found = forecast(config, 1)
    accumulates, memory = found.accumulation > 1, found.step.memory
    real = take_real(config, accumulates=accumulates)
    kept = memory["weights"], memory["gradients"] if accumulates else 0, memory["optimizer"]
    assert found.step.computed == real.flops
    assert kept == (real.weights, real.gradients, real.optimizer)
    assert found.step.peak - sum(kept) == pytest.approx(real.peak, rel=0.02)
    if "frozen" not in kind and "base" not in kind:  # only trained parts run
        assert sum(found.step.flops.values()) == pytest.approx(real.flops, rel=0.02)


@pytest.mark.slow
def test_tiles_have_the_tokens_that_the_llm_reads(composed):
    config = composed(*STEPS["tiles"])
    found = forecast(config, 1)
    # 4 x 4 patches a frame and windows of 2 x 2: 4 frames, a thumbnail, then 4 x 4 and newlines.
    assert found.visual_tokens == 4 * 4 + 4 + 4 * (4 + 1)
    assert found.step.tokens == 300 * found.step.samples


@pytest.mark.slow
def test_a_frozen_copy_is_kept_in_pieces_and_base_weights_are_none_of_their_own(composed):
    copied, streamed, split = (
        forecast(composed(*PAIRS, "data.global_batch_size=4", *words), ranks).step.memory["weights"]
        for ranks, words in (
            (1, []),
            (1, ["module/reference=streamed"]),
            (2, ["trainer=fsdp_sim"]),
        )
    )
    assert copied == 2 * streamed
    assert streamed < split < 1.1 * streamed, "each rank has half of two models"


class Noting(VideoLLMModule):
    """Records the bytes of each block's gathered weights while it runs."""

    def configure_model(self):
        super().configure_model()
        self.noted = []
        for block in self.network.blocks():
            assert isinstance(block, FSDPModule)
            block.register_forward_pre_hook(lambda block, _: self.noted.append(_bytes(block)))


def _bytes(block):
    return sum(p.nbytes for p in block.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`", "ignore:.*does not have many workers")
def test_mixed_precision_gathers_in_shards_what_the_run_gathers(composed, run_ranks):
    words = ["trainer=fsdp_sim", "trainer.precision=bf16-mixed", "optim.optimizer.fused=false"]
    config = composed(*PROBE, *words, "data.batch_size=2")
    data, sample = build(config.data, "data"), Largest.of(config)
    optimizer = build(config.optim.optimizer, "optim")
    network = VideoLLMModule(plain(config.model), optimizer).network
    batch = data.outlined(sample.outline(network, RealFrames()))
    loader = DataLoader([batch] * 2, collate_fn=lambda batches: batches[0])
    trainer = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer |= {"enable_model_summary": False, "max_steps": 1}

    def run(rank):
        module = Noting(plain(config.model), optimizer)
        build(config.trainer, "trainer", **trainer).fit(module, loader)
        pieces = [local_piece(p).nbytes for p in module.parameters()]
        return module.noted, sum(pieces)

    planned = Noting(plain(config.model), optimizer)
    planned.precision = precision_of(config)
    rehearse(
        planned,
        lambda network, fake: data.outlined(sample.outline(network, fake)),
        ranks=2,
        sharded=True,
    )
    pieces = sum(local_piece(p).nbytes for p in planned.parameters())
    running = [*network.encoder.vision.encoder.layers, *network.llm.blocks()]  # no prompts are read
    noted, kept = run_ranks(2, run)[0]
    assert noted == planned.noted
    assert noted == [_bytes(block) // 2 for block in running], "bfloat16, not float32"
    assert kept == pieces
