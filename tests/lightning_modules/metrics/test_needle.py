"""The needle test: shared prefixes change no answer, and the canaries fail when they must."""

import json
from dataclasses import asdict

import lightning
import pytest
import torch
from hydra.utils import instantiate

from datamodules.batch import IGNORE_INDEX, Visual
from experiments.reporting.measured import read_needle
from experiments.reporting.tables import LEAST_LOGIT_CHANGE
from experiments.run.compose import plain
from lightning_modules.metrics.needle.prefix import PrefixCache
from lightning_modules.metrics.needle.scores import NeedleModule, NeedleScores
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig

ROTARY = ("vanilla", "tad", "mrope", "videorope")
POOLERS = ("average_2x2", "prompt_guided_2x2", "none")
BT_ADAPTER = "model.encoder.bt_adapter={depth: 2, max_frames: 12}"
PROTOCOL = {
    "run": "a",
    "rotary": "videorope",
    "seed": 0,
    "step": 0,
    "protocol": {"train_frames": [3, 6]},
}


@pytest.fixture(scope="module")
def make(compose, tiny, tmp_path_factory):
    """`make(*overrides)` returns a model with large random weights, and the data."""

    def build(*overrides):
        # An encoder that is named here may read frames of any size.
        other = any(word.startswith("encoder=") for word in overrides)
        words = [word for word in tiny if not (other and word.startswith("model.encoder."))]
        config = compose([*words, *overrides], tmp_path_factory.mktemp("run"))
        torch.manual_seed(0)
        model = VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).eval()
        with torch.no_grad():
            for weight in model.llm.parameters():
                weight.mul_(3 if weight.ndim > 1 else 1)
        datamodule = instantiate(config.data, _convert_="all")
        datamodule.setup("test")
        return model, datamodule

    return build


def run_test(model, datamodule, folder=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NeedleModule(model, PROTOCOL, folder, **options)
    trainer.test(module, datamodule=datamodule, verbose=False)
    return module.scores


def encode(model, datamodule, row):
    """Returns the tokens of the videos of a cell, encoded frame by frame."""
    return model.encoder([Visual(datamodule.bank[order]) for order in row.order])


@torch.no_grad()
def from_scratch(model, datamodule):
    """Yields each cell alone: ((condition, frames, depth, needle), correct, log-probability)."""
    for row in (datamodule.test_dataloader()[i] for i in range(len(datamodule.test_dataloader()))):
        for needle, order in enumerate(row.order):
            text = datamodule._encode([datamodule._grid._needles[needle]], row.frames)
            frames = datamodule.bank[order]  # each is one time step
            frames = frames.repeat_interleave(model.encoder.frames_per_step, dim=0)
            encoded = model.encoder([Visual(frames)])
            inputs = model.compose(text, encoded)
            hidden = model.llm(inputs.embeds, inputs.mask, inputs.positions)
            target = inputs.labels[0, 1:]
            logits = model.llm.head(hidden[0, :-1][target != IGNORE_INDEX])
            target = target[target != IGNORE_INDEX]
            log_prob = logits.log_softmax(-1)[range(len(target)), target].sum().item()
            place = (row.condition, row.frames, row.depth, needle)
            yield place, bool((logits.argmax(-1) == target).all()), log_prob


#: An encoder that reads two frames as one time step.
PAIRS = ("encoder=qwen2_vl_tiny", "data.frames.image_size=32")
CASES = [(rotary, pooler, ()) for rotary in ROTARY for pooler in POOLERS]
CASES += [
    ("videorope", "prompt_guided_2x2", (BT_ADAPTER,)),
    ("mrope", "average_2x2", (BT_ADAPTER,)),
]
CASES += [("videorope", "none", PAIRS), ("vanilla", "average_2x2", PAIRS)]


@pytest.mark.parametrize(("rotary", "pooler", "encoder"), CASES)
def test_answers_are_those_of_each_cell_read_from_scratch(rotary, pooler, encoder, make):
    sizes = ["data.grid.needles=4", "data.grid.depths=[0.0,0.5]"]
    model, datamodule = make(f"rotary={rotary}", f"pooler={pooler}", *encoder, *sizes)
    assert model.encoder.per_frame != (BT_ADAPTER in encoder)
    scores = run_test(model, datamodule)
    found = {
        (name, cell["frames"], cell["depth"], cell["needle"]): cell
        for name, cells in scores.cells.items()
        for cell in cells
    }
    expected = list(from_scratch(model, datamodule))
    assert len(expected) == len(found)
    for place, correct, log_prob in expected:
        assert found[place]["log_prob"] == pytest.approx(log_prob, abs=2e-3), place
        assert found[place]["correct"] == correct, place
    assert len({cell["log_prob"] for cell in found.values()}) > len(found) // 2


@pytest.mark.parametrize("chunk_tokens", [7, 4096])
@pytest.mark.parametrize("rotary", ROTARY)
def test_hidden_states_are_those_of_a_full_forward(rotary, chunk_tokens, make):
    """Several rows at a time, single rows between them, and states from any token on."""
    model, datamodule = make(f"rotary={rotary}", "data.grid.needles=4")
    prefixes = PrefixCache(model, chunk_tokens)
    grid, generator = datamodule.test_dataloader(), torch.Generator().manual_seed(0)
    for number in range(len(grid)):
        row = grid[number]
        encoded = encode(model, datamodule, row)
        groups = [range(4)] if number % 3 else [range(1), range(1, 2), range(2, 4)]
        for rows in groups:
            some = [encoded[i] for i in rows]
            inputs = model.compose(row.text.select(rows), some)
            shortest = int(inputs.mask.sum(1).min())
            start = int(torch.randint(shortest, (1,), generator=generator))
            hidden = prefixes.hidden(inputs, start)
            full = model.llm(inputs.embeds, inputs.mask, inputs.positions)
            kept = inputs.mask[:, start:]
            torch.testing.assert_close(hidden[kept], full[:, start:][kept], rtol=1e-3, atol=1e-4)
    assert prefixes.computed < 0.95 * prefixes.recomputed


def test_tokens_are_counted_as_they_go_through_the_llm(make):
    model, datamodule = make()
    counted = 0

    def count(module, args, output):
        nonlocal counted
        _, mask, positions = args[:3]
        new = positions.shape[2]
        counted += new * positions.shape[1] if mask is None else int(mask[:, -new:].sum())

    model.llm.register_forward_hook(count)
    scores = run_test(model, datamodule)
    assert scores.token_forwards["computed"] == counted
    lengths = (
        int(model.compose(row.text, encode(model, datamodule, row)).mask.sum())
        for row in (
            datamodule.test_dataloader()[i] for i in range(len(datamodule.test_dataloader()))
        )
    )
    assert scores.token_forwards["recomputed"] == sum(lengths)


def test_rows_read_alone_have_the_same_answers_and_one_cache(make, monkeypatch):
    """No copy of the cache is made, and as few tokens are read as together."""
    model, datamodule = make("~data.grid.conditions.periodic", "rotary=mrope")
    together = run_test(model, datamodule)
    prefix = "lightning_modules.metrics.needle.prefix"
    monkeypatch.setattr(f"{prefix}.deepcopy", lambda _: pytest.fail("the cache is copied"))
    monkeypatch.setattr(
        "transformers.DynamicCache.batch_repeat_interleave", lambda *_: pytest.fail("repeated")
    )
    alone = run_test(model, datamodule, batch_tokens=1)
    for name, cells in together.cells.items():
        for one, other in zip(alone.cells[name], cells, strict=True):
            assert one["log_prob"] == pytest.approx(other["log_prob"], abs=2e-3)
            assert {**one, "log_prob": 0} == {**other, "log_prob": 0}
    assert alone.token_forwards["computed"] <= together.token_forwards["computed"]


def test_a_plain_grid_takes_half_of_the_tokens(make):
    model, datamodule = make(
        "~data.grid.conditions.periodic",
        "data.grid.frames=[48]",
        "data.grid.needles=10",
        "data.grid.depths=[0.0,0.2,0.4,0.6,0.8,1.0]",
    )
    counts = run_test(model, datamodule).token_forwards
    assert counts["computed"] <= 0.55 * counts["recomputed"]


def test_needle_json_is_what_a_report_reads(make, tmp_path):
    model, datamodule = make()
    scores = run_test(model, datamodule, tmp_path)
    needle = read_needle(tmp_path / "needle.json")
    grid = datamodule.grid
    cells = len(grid.frames) * len(grid.depths) * grid.needles
    assert {name: len(c) for name, c in needle.cells.items()} == {
        name: cells for name in grid.conditions
    }
    assert needle.changed_at[1] == 0.5
    assert needle.logit_change > LEAST_LOGIT_CHANGE
    assert needle.computed < needle.recomputed
    raw = json.loads((tmp_path / "needle.json").read_text())
    assert raw["canaries"]["blind"]["n"] == len(grid.frames) * grid.needles
    assert raw["canaries"]["ceiling"]["n"] == grid.needles
    answers = list(scores.answers.values())
    assert needle.majority == max(map(answers.count, answers)) / len(answers)
    assert asdict(scores)["cells"].keys() == {"blind", "ceiling", *grid.conditions}


def test_a_model_that_cannot_see_the_middle_is_found_out(make):
    """Two layers that look back 4 tokens each: the needle is further away from the answer."""
    window = [
        "+model.llm.config.use_sliding_window=true",
        "+model.llm.config.sliding_window=4",
        "+model.llm.config.max_window_layers=0",
    ]
    model, datamodule = make(*window)
    assert set(model.llm.lm.config.layer_types) == {"sliding_attention"}
    change = run_test(model, datamodule)._sensitivity()["max_logit_change"]
    assert change < LEAST_LOGIT_CHANGE
    seeing, datamodule = make()
    assert run_test(seeing, datamodule)._sensitivity()["max_logit_change"] > 1e-2


def test_the_least_sensitive_length_is_what_is_told():
    scores = NeedleScores(sensitivity={8: (0.5, 0.7), 64: (0.4, 0.0), 16: (0.5, 0.2)})
    assert scores._sensitivity() == {"frames": 64, "depth": 0.4, "max_logit_change": 0.0}


def test_canaries_are_the_scores_of_their_rows():
    def cells(*correct):
        return [{"needle": n, "correct": c} for n, c in enumerate(correct)]

    scores = NeedleScores(
        cells={
            "plain": cells(True, True, True, False),
            "blind": cells(False, True, False, False),
            "ceiling": cells(True, True),
        },
        answers={0: "a", 1: "b", 2: "a", 3: "a"},
        sensitivity={4: (0.5, 1.0)},
    )
    summary = scores.summary()
    assert summary["conditions"].keys() == {"plain"}
    assert summary["conditions"]["plain"]["mean"] == 0.75
    assert summary["canaries"]["blind"]["mean"] == 0.25
    assert summary["canaries"]["ceiling"]["mean"] == 1
    assert summary["canaries"]["blind"]["majority"] == 0.75


def test_what_was_asked_and_said_is_kept(make, tmp_path):
    model, datamodule = make("rotary=mrope", "data.grid.frames=[4]")
    run_test(model, datamodule, tmp_path)
    raw = json.loads((tmp_path / "needle.json").read_text())
    needles = datamodule._grid._needles
    assert len(raw["asked"]) == len(needles)
    for number, needle in enumerate(needles):
        asked = raw["asked"][str(number)]
        assert asked["answer"] == needle.answer
        assert needle.question in asked["prompt"]
        assert "<visual>" in asked["prompt"]
    cells = [cell for name in raw["conditions"] for cell in raw["conditions"][name]["cells"]]
    assert len({cell["said"] for cell in cells}) > 1
    for cell in cells:
        if cell["correct"]:
            assert cell["said"] == raw["asked"][str(cell["needle"])]["answer"]
    lines = read_needle(tmp_path / "needle.json").said()
    assert len(lines) == len(cells)
    assert {line["right"][0] for line in lines.values()} == {needle.answer for needle in needles}
