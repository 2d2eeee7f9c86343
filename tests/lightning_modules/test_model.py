"""The whole pipeline: mixed batches, exact shortcuts, generation, contents of a checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Grid, VideoBatch, pad_rows, visual_fields
from experiments import CONFIG_DIR
from lightning_modules.loss import sequence_log_probs
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.spec import build
from tests.helpers.visuals import frames_of, outline, row_of

ROTARY = sorted(path.stem for path in (CONFIG_DIR / "rotary").glob("*.yaml"))
POOLERS = {
    "average": {"_target_": "lightning_modules.pooler.average.AveragePooler", "kernel": [2, 2, 2]},
    "prompt_guided": {
        "_target_": "lightning_modules.pooler.prompt_guided.PromptGuidedPooler",
        "kernel": [2, 2, 2],
    },
    "none": {"_target_": "lightning_modules.pooler.identity.IdentityPooler"},
}


def specs(rotary="videorope", pooler="average", tie=True, bt_adapter=None):
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    return {
        "encoder": {
            "_target_": "lightning_modules.encoder.clip.ClipEncoder",
            "config": {
                "vision": {**vision, **heads, "image_size": 32, "patch_size": 8},
                "text": {**text, **heads, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58},
                "projection_dim": 8,
            },
            "context_length": None,
            "bt_adapter": bt_adapter,
        },
        "pooler": POOLERS[pooler],
        "rotary": OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"rotary/{rotary}.yaml")),
        "llm": {
            "_target_": "lightning_modules.llm.causal_lm.CausalLM",
            "config": {
                "model_type": "qwen2",
                "vocab_size": 50,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.2,
                "tie_word_embeddings": tie,
            },
        },
    }


def make_model(**options):
    torch.manual_seed(0)
    return VideoLanguageModel(VideoLanguageModelConfig(**specs(**options))).eval()


def make_batch(rows, counts, seed=0):
    """Rows of ids (VISUAL_SLOT for a visual); the last two tokens of each are its answer."""
    torch.manual_seed(seed)
    labels = [[IGNORE_INDEX] * (len(row) - 2) + row[-2:] for row in rows]
    prompts = torch.randint(0, 57, (len(rows), 6))
    prompts[:, -1] = 59
    return VideoBatch(
        input_ids=pad_rows(rows, 0),
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        labels=pad_rows(labels, IGNORE_INDEX),
        **frames_of(torch.randint(0, 256, (sum(counts), 3, 32, 32), dtype=torch.uint8), counts),
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        keys=[str(i) for i in range(len(rows))],
    )


S = VISUAL_SLOT
#: Two videos of different length and an image, only text, one video first, two side by side.
MIXED = [[1, 2, S, 3, S, 4, S, 5, 6], [7, 8, 9], [S, 10, 11, 12], [13, S, S, 14, 15]]
COUNTS = [4, 6, 1, 2, 4, 1]


def rows_of(batch):
    """Yields the same samples as batches of one."""
    visual = 0
    for i in range(len(batch)):
        length = int(batch.attention_mask[i].sum())
        mine = int((batch.input_ids[i] == S).sum())
        yield VideoBatch(
            batch.input_ids[i : i + 1, :length],
            batch.attention_mask[i : i + 1, :length],
            batch.labels[i : i + 1, :length],
            **visual_fields(batch.visuals[visual : visual + mine]),
            prompt_ids=batch.prompt_ids[i : i + 1],
            prompt_mask=batch.prompt_mask[i : i + 1],
            keys=batch.keys[i : i + 1],
        )
        visual += mine


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_padded_equals_unpadded(rotary, pooler):
    model = make_model(rotary=rotary, pooler=pooler)
    together = model(make_batch(MIXED, COUNTS))
    for i, row in enumerate(rows_of(make_batch(MIXED, COUNTS))):
        alone = model(row)
        length = alone.hidden.shape[1]
        torch.testing.assert_close(together.hidden[i, :length], alone.hidden[0], atol=2e-5, rtol=0)
        assert outline(alone.inputs.segments[0]) == outline(together.inputs.segments[i])


@torch.no_grad()
def test_layouts_and_labels():
    inputs = make_model()(make_batch(MIXED, COUNTS)).inputs
    small, large, image = Grid(2, 2, 2), Grid(3, 2, 2), Grid(1, 2, 2)
    rows = [(2, small, 1, large, 1, image, 2), (3,), (image, 3), (1, small, image, 2)]
    assert [outline(row) for row in inputs.segments] == [outline(row_of(*row)) for row in rows]
    assert inputs.embeds.shape == (4, 2 + 8 + 1 + 12 + 1 + 4 + 2, 32)
    learnt = [row[row != IGNORE_INDEX].tolist() for row in inputs.labels]
    assert learnt == [[5, 6], [8, 9], [11, 12], [14, 15]]


@torch.no_grad()
def test_a_batch_of_text_alone():
    model = make_model(pooler="prompt_guided")
    output = model(make_batch([[1, 2, 3, 4], [5, 6, 7]], []))
    stock = model.llm.lm(torch.tensor([[1, 2, 3, 4]])).logits
    torch.testing.assert_close(model.llm.head(output.hidden)[:1], stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rows", "counts"), [(MIXED, COUNTS), ([[1, 2, S], [3, S, 4, S]], [6, 1, 4])]
)
@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_generation_equals_full_forwards(rotary, rows, counts):
    """Several visuals, left padding, and the cache of every token against no cache.

    The second batch has rows that end with a visual, as a captioner's prompt does.
    """
    model = make_model(rotary=rotary, pooler="prompt_guided")
    batch = make_batch(rows, counts)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    new = model.generate(batch, **options)
    for i, row in enumerate(rows_of(batch)):
        for step in range(4):
            ids = torch.cat([row.input_ids, new[i : i + 1, :step]], dim=1)
            grown = replace(
                row,
                input_ids=ids,
                attention_mask=torch.ones_like(ids, dtype=torch.bool),
                labels=torch.full_like(ids, IGNORE_INDEX),
            )
            logits = model.llm.head(model(grown).hidden[0, -1])
            assert logits.argmax() == new[i, step]


@torch.no_grad()
def test_beams_are_a_matter_of_transformers():
    model = make_model(rotary="tad")
    new = model.generate(make_batch(MIXED, COUNTS), max_new_tokens=3, num_beams=3, pad_token_id=0)
    assert new.shape == (4, 3)


def test_the_head_runs_only_where_there_is_a_label():
    seen = []

    def head(hidden):
        seen.append(hidden.shape[0])
        return hidden @ torch.eye(8)

    hidden = torch.randn(2, 5, 8, requires_grad=True)
    labels = torch.full((2, 5), IGNORE_INDEX)
    labels[0, 3:], labels[1, 1] = torch.tensor([1, 7]), 4
    sums, counts = sequence_log_probs(hidden, labels, head)
    full = nn.functional.cross_entropy(
        hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    assert seen == [3]
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(-sums.sum() / 3, full)


def test_loss_without_a_label_is_a_zero_that_can_be_stepped():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    labels = torch.full((1, 4), IGNORE_INDEX)
    sums, counts = sequence_log_probs(hidden, labels, nn.Linear(8, 5))
    sums.sum().backward()
    assert sums.tolist() == [0]
    assert counts.tolist() == [0]
    assert hidden.grad is not None


def test_gradients_reach_every_stage():
    model = make_model(pooler="prompt_guided").train()
    model(make_batch(MIXED, COUNTS)).loss.backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert without == []


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_save_and_load(tmp_path, tie):
    model = make_model(rotary="videorope", pooler="prompt_guided", tie=tie)
    batch = make_batch(MIXED, COUNTS)
    model.save_pretrained(tmp_path)
    again, report = VideoLanguageModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again.eval()(batch).hidden, model(batch).hidden)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rotary"]["_target_"] == "lightning_modules.rotary.videorope.VideoRope"


@torch.no_grad()
def test_another_scheme_only_by_name(tmp_path):
    model = make_model(rotary="videorope")
    model.save_pretrained(tmp_path)
    named = VideoLanguageModel.from_pretrained(tmp_path, rotary=specs("mrope")["rotary"])
    assert type(named.rotary).__name__ == "MRope"
    batch = make_batch(MIXED, COUNTS)
    assert not torch.allclose(named.eval()(batch).hidden, model(batch).hidden)
    assert type(VideoLanguageModel.from_pretrained(tmp_path).rotary).__name__ == "VideoRope"


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.nn.Linear",
        "datamodules.visuals.frames.FrameReader",
        "lightning_modules.model.torch.load",
        "lightning_modules.model.build",
        "lightning_modules.model.PreTrainedModel",
        "lightning_modules.nowhere.Nothing",
        "lightning_modules_evil.Thing",
        "VideoRope",
    ],
)
def test_only_classes_of_this_package_are_built(path, tmp_path):
    with pytest.raises(ValueError, match=r"class .*(refused|lightning_modules)"):
        build({"_target_": path})
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rotary"]["_target_"] = path
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"class .*(refused|lightning_modules)"):
        VideoLanguageModel.from_pretrained(tmp_path)


def test_a_foreign_module_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="refused"):
        build({"_target_": "intruder.Thing"})


def test_mistakes_in_a_spec_are_one_line():
    wrong = specs()
    wrong["rotary"] = {**wrong["rotary"], "temporal_spacin": 1}
    with pytest.raises(ValueError, match="temporal_spacin"):
        VideoLanguageModel(VideoLanguageModelConfig(**wrong))
    wrong = specs()
    wrong["pooler"] = {**wrong["pooler"], "kernel": [2, 3, 3]}
    with pytest.raises(ValueError, match=r"model\.pooler\.\w*kernel"):
        VideoLanguageModel(VideoLanguageModelConfig(**wrong))
    wrong = specs()
    wrong["llm"] = {"_target_": wrong["llm"]["_target_"], "config": {"model_type": "gpt2"}}
    with pytest.raises(ValueError, match="Llama or Qwen"):
        VideoLanguageModel(VideoLanguageModelConfig(**wrong))


def test_slots_must_match_visuals():
    with pytest.raises(ValueError, match="3 visual slots, but there are 2 visuals"):
        make_batch([[S, S, 1, 2], [S, 3, 4]], [2, 2])


@torch.no_grad()
def test_the_pooler_tells_the_rotary_stage_what_is_left():
    """Positions are those of the pooled grid, not of the encoder's."""
    for pooler, grid in (("none", Grid(4, 4, 4)), ("average", Grid(2, 2, 2))):
        model = make_model(pooler=pooler)
        inputs = model(make_batch([[1, S, 2, 3]], [4])).inputs
        row = row_of(1, grid, 2)
        assert outline(inputs.segments[0]) == outline(row)
        assert torch.equal(inputs.positions, model.rotary.batch_positions([row]))
