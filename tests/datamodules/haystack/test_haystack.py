"""Haystacks: the draws of training, and the visuals of each cell."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning import Trainer

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.haystack.cells import GridPlan, NeedleGrid
from datamodules.haystack.datamodule import (
    HaystackDataModule,
    HaystackOptions,
    HaystackSamples,
    TrainingPlan,
)
from datamodules.haystack.distractors import PeriodicDistractors, SingleDistractor
from datamodules.haystack.needle import Needle
from datamodules.sample.conversation import ConversationEncoder
from datamodules.visuals.frames import FpsSampler, FrameReader
from datamodules.visuals.sizes import Crop, Fixed, Native, Pad, Square

QUESTIONS, CLIP_LENGTHS = 4, (7, 12)
PLAN = TrainingPlan(samples=40, frames=(6, 12), needles=3, first_frames=(3, 4), growth=0.5)


@pytest.fixture(scope="module")
def conversation():
    return ConversationEncoder()


@pytest.fixture(scope="module")
def clips():
    """Makes a video in which every frame has its own colour."""
    numbers = torch.arange(sum(CLIP_LENGTHS), dtype=torch.uint8)
    return list(numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).split(CLIP_LENGTHS))


@pytest.fixture(scope="module")
def needles():
    return [
        Needle(
            torch.full((3, 2, 2), 100 + n, dtype=torch.uint8),
            f"What is on card {n % QUESTIONS}?",
            f"answer {n}",
            f"key{n}",
        )
        for n in range(10)
    ]


@pytest.fixture(scope="module")
def samples(clips, needles, conversation):
    return HaystackSamples(clips, needles, PLAN, conversation, 5)


def shown(sample) -> list[int]:
    return sample.visuals[0].frames[:, 0, 0, 0].tolist()


def test_a_sample_is_a_function_of_seed_and_number(samples, clips, needles, conversation):
    again = HaystackSamples(clips, needles, PLAN, conversation, 5)
    other = HaystackSamples(clips, needles, PLAN, conversation, 6)
    order = np.random.default_rng(0).permutation(PLAN.samples).tolist()
    drawn = {n: samples[n] for n in order}
    for n in range(PLAN.samples):
        assert shown(again[n]) == shown(drawn[n])
        assert again[n].text == drawn[n].text
    assert any(shown(other[n]) != shown(drawn[n]) for n in range(5))


def test_a_sample_is_a_stretch_of_one_clip_with_needles_that_are_asked_for(samples, conversation):
    most = 0
    for n in range(PLAN.samples):
        frames = shown(samples[n])
        hay = [(place, frame) for place, frame in enumerate(frames) if frame < 100]
        cards = [frame - 100 for frame in frames if frame >= 100]
        most = max(most, len(cards))
        assert 1 <= len(cards) <= PLAN.needles
        assert len({card % QUESTIONS for card in cards}) == len(cards), "a question has two answers"
        for first, length in ((0, 7), (7, 12)):
            own = [(place, f) for place, f in hay if first <= f < first + length]
            assert len({(f - first - place) % length for place, f in own}) <= 1
            assert own in ([], hay)
        answers = [i for i in samples[n].text.labels if i != IGNORE_INDEX]
        text = conversation.tokenizer.decode(answers, skip_special_tokens=True)
        assert sorted(text.replace("answer", " ").split()) == sorted(map(str, cards))
        assert samples[n].text.input_ids.count(VISUAL_SLOT) == 1
    assert most == PLAN.needles


def test_videos_grow_over_the_first_part_of_a_training(samples):
    assert PLAN.range_at(0) == (3, 4)
    assert PLAN.range_at(10) == (4, 8)
    assert PLAN.range_at(20) == PLAN.range_at(39) == (6, 12)
    lengths = [len(shown(samples[n])) for n in range(PLAN.samples)]
    assert all(
        low <= length <= high
        for length, (low, high) in zip(lengths, map(PLAN.range_at, range(40)), strict=True)
    )
    assert max(lengths[:5]) < max(lengths[20:])


def standing(rank: int, world: int, done: int = 0) -> Mock:
    """A stand-in for a trainer, with what a datamodule asks for its position."""
    trainer = Mock(spec=Trainer, global_rank=rank, world_size=world)
    trainer.overfit_batches, trainer.current_epoch, trainer.fit_loop = 0, 0, Mock()
    trainer.fit_loop.epoch_loop.batch_progress.current.processed = done
    return trainer


@pytest.fixture(scope="module")
def make_module(needle_shards):
    def make(
        batch_size: int = 4, global_batch_size: int = 24, frames: FrameReader | None = None, **grid
    ) -> HaystackDataModule:
        folder = needle_shards / "vniah"
        sizes = {"frames": [4, 9], "depths": [0.0, 0.5, 1.0], "needles": 6}
        return HaystackDataModule(
            {
                kind: {s: str(folder / f"{kind}-{s}.tar") for s in ("train", "test")}
                for kind in ("haystack", "needles")
            },
            frames=frames or FrameReader(32, FpsSampler(25.0, 3000)),
            conversation=ConversationEncoder,
            training=TrainingPlan(samples=48, frames=(3, 6), first_frames=(3, 4)),
            grid=GridPlan(**sizes | grid),
            batch_size=batch_size,
            global_batch_size=global_batch_size,
        )

    return make


@pytest.fixture
def module(make_module) -> HaystackDataModule:
    module = make_module()
    module.setup()
    return module


def keys(module, rank: int, world: int, done: int = 0) -> list[list[str]]:
    module.trainer = standing(rank, world, done)
    loader = module.train_dataloader()
    batches = [batch.keys for batch in loader]
    assert len(batches) == len(loader) - done
    return batches


@pytest.mark.parametrize(
    ("policy", "side", "size"),
    [
        (Square(), 32, (32, 32)),
        (Pad(), 32, (32, 32)),
        (Crop(), 32, (32, 32)),
        (Fixed(28, 56), None, (28, 56)),
    ],
)
def test_all_frames_of_a_test_have_the_size_of_the_policy(policy, side, size, make_module):
    frames = FrameReader(side, FpsSampler(25.0, 3000), policy=policy, filter="bicubic")
    module = make_module(frames=frames)
    module.setup()
    assert module.bank.shape[2:] == size


def test_frames_of_several_sizes_are_refused(make_module, monkeypatch):
    frames = FrameReader(None, FpsSampler(25.0, 3000), policy=Native(min_pixels=784))
    wider = frames.image
    monkeypatch.setattr(frames, "image", lambda data: wider(data).repeat(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"must have one size, but some have \d+ x \d+ pixels and"):
        make_module(frames=frames).setup()


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_all_samples(module, world):
    ranks = [keys(module, rank, world) for rank in range(world)]
    steps = [[key for batch in step for key in batch] for step in zip(*ranks, strict=True)]
    assert [key for step in steps for key in step] == [f"#{n}" for n in range(48)]


def test_ranks_see_at_a_step_what_one_sees_in_a_larger_batch(make_module):
    two, one = make_module(4), make_module(8)
    two.setup()
    one.setup()
    halves = zip(keys(two, 0, 2), keys(two, 1, 2), strict=True)
    assert [a + b for a, b in halves] == keys(one, 0, 1)


def test_a_training_goes_on_with_the_sample_after_the_last(module):
    assert keys(module, 1, 2, done=3) == keys(module, 1, 2)[3:]


def test_a_loader_asks_for_its_place_with_the_first_batch(module):
    """Lightning makes loaders to count steps before it restores a checkpoint."""
    module.trainer = standing(0, 1)
    loader = module.train_dataloader()
    module.trainer = standing(0, 1, done=5)
    assert next(iter(loader)).keys == [f"#{n}" for n in range(20, 24)]


def test_a_checkpoint_keeps_the_place_and_refuses_another_plan(module, make_module):
    other = make_module(batch_size=8)
    module.trainer = standing(1, 2, done=3)
    state = module.state_dict()
    assert (state["epoch"], state["micro_batches"], state["faults"]) == (0, 6, {})
    with pytest.raises(ValueError, match=r"settings.*batch 4 step 6.*batch 8 step 3.*go_on"):
        other.load_state_dict(state)
    module.load_state_dict(state)
    assert next(iter(module.train_dataloader())).keys == [f"#{n}" for n in range(28, 32)]
    module.load_state_dict(state | {"micro_batches": 3})
    with pytest.raises(ValueError, match=r"at micro-batch 6 of all ranks, but .* is at 3"):
        next(iter(module.train_dataloader()))


def test_steps_that_cannot_be_shared_or_filled_are_refused(module, make_module):
    module.trainer = standing(0, 4)
    with pytest.raises(ValueError, match=r"6 micro-batches.*by 4 ranks; use 1, 2, 3, 6 ranks"):
        module.train_dataloader()
    with pytest.raises(ValueError, match="legal batch sizes for 4 ranks: 1, 2, 3, 6"):
        module.accumulation(4)
    large = make_module(batch_size=4, global_batch_size=52)
    large.setup()
    with pytest.raises(ValueError, match=r"data.training.samples is 48, fewer than the 52"):
        large.train_dataloader()


def test_splits_share_neither_clips_nor_needles(module):
    (train_clips, train_needles), (test_clips, test_needles) = (
        module._sets[split] for split in ("train", "test")
    )
    for train, test in (
        (torch.cat(train_clips), torch.cat(test_clips)),
        (
            torch.stack([needle.frame for needle in train_needles]),
            torch.stack([needle.frame for needle in test_needles]),
        ),
    ):
        same = (train[:, None] == test[None]).flatten(2).all(-1)
        assert not same.any()
    batch = next(iter(module.val_dataloader()))
    videos = [visual.frames for visual in batch.visuals]
    seen = torch.cat(train_clips)
    assert not any((video[:, None] == seen[None]).flatten(2).all(-1).any() for video in videos)


@pytest.mark.parametrize("frames", [1, 7, 40])
@pytest.mark.parametrize("period", [1, 3, 11])
def test_periodic_distractors_stand_at_every_multiple_of_the_period(frames, period):
    for needle in range(frames):
        places = PeriodicDistractors(period).places(needle, frames, np.random.default_rng(0))
        assert places == [
            at for at in range(frames) if at != needle and (at - needle) % period == 0
        ]


@pytest.mark.parametrize(
    ("needle", "frames", "possible"),
    [
        (0, 20, {5}),
        (19, 20, {14}),
        (4, 20, {9}),
        (10, 20, {5, 15}),
        (2, 5, set()),  # no side is in range, so there is none, as in the published code
        (0, 5, set()),
        (0, 6, {5}),
    ],
)
def test_a_single_distractor_stands_a_period_away_where_there_is_room(needle, frames, possible):
    drawn = [
        SingleDistractor(5).places(needle, frames, np.random.default_rng(seed))
        for seed in range(20)
    ]
    assert {place for places in drawn for place in places} == possible
    assert all(len(places) == bool(possible) for places in drawn)


GRID = GridPlan(
    frames=[5, 12],
    depths=[0.0, 0.2, 0.5, 1.0],
    needles=6,
    conditions={"plain": None, "periodic": PeriodicDistractors(4), "single": SingleDistractor(4)},
)


@pytest.fixture(scope="module")
def encode(make_module, conversation):
    """Returns the text of each question, as a grid gets it."""
    module = make_module()
    module.conversation = conversation
    return module._encode


@pytest.fixture(scope="module")
def grid(clips, needles, encode):
    return NeedleGrid(clips, needles, GRID, encode)


def test_a_grid_has_every_cell_once(grid):
    rows = [grid[i] for i in range(len(grid))]
    tested = [(r.condition, r.frames, r.depth) for r in rows]
    cells = [(c, f, d) for c in GRID.conditions for f in GRID.frames for d in GRID.depths]
    controls = [("ceiling", 1, 0.0), ("blind", 5, 0.5), ("blind", 12, 0.5)]
    assert sorted(tested) == sorted(cells + controls)
    assert all(row.needles == list(range(6)) for row in rows)


def test_the_needle_stands_at_its_depth_among_the_frames_of_the_haystack(grid):
    hay = max(GRID.frames)
    for row in (grid[i] for i in range(len(grid))):
        assert row.order.shape == (6, row.frames)
        place = round(row.depth * (row.frames - 1))
        for needle, order in enumerate(row.order):
            strange = (order != torch.arange(row.frames)).nonzero().flatten().tolist()
            if row.condition == "blind":
                assert not strange
            if row.condition in ("plain", "ceiling"):
                assert strange == [place]
            if row.condition in ("periodic", "single"):
                assert place in strange
                for at in set(strange) - {place}:
                    other = int(order[at]) - hay
                    assert grid._needles[other].question != grid._needles[needle].question
            if row.condition != "blind":
                assert order[place] == hay + needle
        assert [shape[0] for shape in row.text.shapes] == [row.frames] * 6


def test_the_bank_holds_the_haystack_and_then_the_needles(grid, clips):
    assert grid.bank.shape[0] == max(GRID.frames) + GRID.needles
    torch.testing.assert_close(grid.bank[:12], torch.cat(clips)[:12])
    assert grid.bank[12:, 0, 0, 0].tolist() == [100 + n for n in (0, 1, 2, 3, 4, 5)]


def test_a_haystack_longer_than_the_film_goes_back_and_forth(clips, needles, encode):
    film = sum(CLIP_LENGTHS)
    bank = NeedleGrid(clips, needles, replace(GRID, frames=[60]), encode).bank
    hay = bank[:60, 0, 0, 0].long()
    assert hay[: 2 * film].tolist() == [*range(film), *reversed(range(film))]
    assert (hay.diff().abs() <= 1).all()


def test_a_grid_is_the_same_each_time(clips, needles, encode):
    one, two = (NeedleGrid(clips, needles, GRID, encode) for _ in range(2))
    assert all(torch.equal(one[i].order, two[i].order) for i in range(len(one)))


def test_too_few_needles_are_counted(clips, needles):
    with pytest.raises(ValueError, match=r"data.grid.needles is 11, but the shards hold 10"):
        NeedleGrid(clips, needles, replace(GRID, needles=11), lambda *_: None)


@pytest.mark.parametrize(
    ("plan", "fields", "key"),
    [
        (TrainingPlan, {"samples": 8, "frames": (24, 6)}, "frames"),
        (TrainingPlan, {"samples": 0, "frames": (6, 24)}, "samples"),
        (TrainingPlan, {"samples": 8, "frames": (6, 24), "needles": 0}, "needles"),
        (GridPlan, {"frames": [], "depths": [0.5], "needles": 2}, "frames"),
        (GridPlan, {"frames": [4], "depths": [2.0], "needles": 2}, "depths"),
        (GridPlan, {"frames": [4], "depths": [0.5], "needles": 0}, "needles"),
    ],
)
def test_a_plan_that_cannot_be_says_which_key(plan, fields, key):
    with pytest.raises(ValueError, match=rf"data\.\w+\.{key} is"):
        plan(**fields)


def test_workers_draw_the_same_samples(make_module):
    drawn = []
    for workers in (0, 2):
        module = make_module()
        module._options = HaystackOptions(seed=3, num_workers=workers)
        module.setup()
        drawn.append([batch.pixels for batch in module.train_dataloader()])
    assert len(drawn[0]) == len(drawn[1]) == 12
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))
    module._options = HaystackOptions(seed=4)
    other = [batch.pixels for batch in module.train_dataloader()]
    pairs = zip(other, drawn[0], strict=True)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def test_a_draw_changes_nothing_else_in_a_sample(clips, needles, conversation):
    """Training has draws and validation has none. Both show the same frames at the same times."""
    plain, drawn = (
        HaystackSamples(clips, needles, PLAN, conversation, 5, drawn=drawn)
        for drawn in (False, True)
    )
    numbers = set()
    for n in range(8):
        assert shown(plain[n]) == shown(drawn[n])
        info = drawn[n].visuals[0].info
        assert plain[n].visuals[0].info == info._replace(draw=None)
        assert info.seconds == tuple(float(frame) for frame in range(len(shown(plain[n]))))
        assert info == drawn[n].visuals[0].info
        numbers.add(info.draw)
    assert len(numbers) == 8
