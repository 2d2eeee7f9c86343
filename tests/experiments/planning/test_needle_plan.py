"""The forecast of a needle test equals a real test that reads its rows one by one."""

import lightning
import pytest
from torch.utils.flop_counter import FlopCounterMode

from experiments.planning.memory_watch import ATTENTION
from experiments.planning.needle_test import _ReadingCost, forecast_needles
from experiments.run.compose import build, plain
from lightning_modules.metrics.needle.scores import NeedleModule
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig

GRID = [
    "data.grid.frames=[8,40]",
    "data.grid.depths=[0.0,0.5,1.0]",
    "data.grid.needles=4",
]


@pytest.fixture(name="planned")
def planned_fixture(compose, tiny, tmp_path):
    def planned(*words):
        config = compose([*tiny, *GRID, *words], tmp_path, "plan")
        return config, forecast_needles(config)

    return planned


@pytest.mark.parametrize("pooler", ["average_2x2", "prompt_guided_2x2"])
def test_flops_are_those_of_a_real_test(pooler, planned, compose, tiny, tmp_path, monkeypatch):
    config = compose([*tiny, *GRID, f"pooler={pooler}"], tmp_path)
    datamodule = build(config.data, "data")
    datamodule.setup("test")
    text = datamodule.test_dataloader()[0].text
    words, answer = int(text.attention_mask[0].sum()) - 1, int((text.labels[0] >= 0).sum())
    monkeypatch.setattr("experiments.planning.needle_test._WORDS", words)
    monkeypatch.setattr("experiments.planning.needle_test._ANSWER", answer)
    _, found = planned(f"pooler={pooler}")
    model = VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).eval()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = NeedleModule(model, batch_tokens=1)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        trainer.test(module, datamodule=datamodule, verbose=False)
    cells = sum(map(len, module.scores.cells.values()))
    assert found.rows == cells == 4 * (1 + 2 + 2 * 2 * 3)
    assert found.frames == 40
    if pooler == "average_2x2":
        assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
        assert found.flops < 0.85 * found.unshared_flops
    else:  # each question weighs the patches in its own way; the planned prompt is the longest one
        assert found.flops == found.unshared_flops
        assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_the_cache_has_the_keys_and_values_of_every_token_once(planned):
    config, found = planned()
    sizes = config.model.llm.config
    head = sizes.hidden_size // sizes.num_attention_heads
    per_token = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * head * 4  # float32
    assert found.memory["cache"] == per_token * found.tokens
    assert found.memory["weights"] > 0
    assert found.memory["rest"] > 0


def test_a_chunk_attends_to_itself_and_all_before_it(planned, monkeypatch, compose, tiny, tmp_path):
    monkeypatch.setattr("experiments.planning.needle_test.CHUNK_TOKENS", 16)
    config = compose([*tiny, *GRID], tmp_path)
    model = VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model)))
    sizes = config.model.llm.config
    cost = _ReadingCost(model, per_frame=4, words=0)
    pairs = (20 - 8) * 20 + 0  # one chunk: tokens 8 to 19 attend to 20 tokens
    first = cost._from(8, 20)
    assert cost._from(8, 44) - first == pytest.approx(
        (cost._weights.flops(1, 0, False) * 24)
        + 4 * sizes.num_hidden_layers * sizes.hidden_size * (16 * 24 + 16 * 40 + 4 * 44 - pairs)
    )
