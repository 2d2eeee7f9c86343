"""Whole checkpoints of Qwen2-VL's layout, in the names and configs of transformers 4.45 and 5.x."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from datamodules.batch import VISUAL_SLOT, Visual, VisualInfo
from lightning_modules.encoder.native.patches import Steps, cut_patches
from lightning_modules.model import VideoLanguageModel
from tests.helpers.published import (
    TEXT,
    assert_near,
    imported,
    make_batch,
    randomise,
    rename,
    run,
)
from tests.helpers.qwen_vl import WORDS, batch_of
from tests.parity.conftest import load

GOLDEN = Path(__file__).parents[2] / "golden" / "videorope"
CKPT = GOLDEN / "ckpt"


def in_memory(name):
    if "visual." in name:
        return f"model.{name}"
    return name if "lm_head" in name else name.replace("model.", "model.language_model.", 1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The published folder: as it is, and as transformers 5.x writes it or holds it."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(CKPT, folder / "4.45")
    model = Qwen2VLForConditionalGeneration.from_pretrained(CKPT)
    model.save_pretrained(folder / "5.x")
    shutil.copytree(folder / "5.x", folder / "5.x in memory")
    rename(folder / "5.x in memory", in_memory)
    return folder


@pytest.fixture(scope="module")
def golden():
    return load(GOLDEN / "public.json")


@pytest.mark.parametrize("layout", ["4.45", "5.x", "5.x in memory"])
@pytest.mark.parametrize("scheme", WORDS)
@torch.no_grad()
def test_every_layout_gives_the_published_logits(scheme, layout, sources, golden, tmp_path):
    """The checkpoint is model a of the golden cases; its bfloat16 values are exact."""
    words = ["--rotary", WORDS[scheme], "--dtype", "float32"]
    model = imported(sources / layout, tmp_path / "out", *words)
    for number in (1, 2):  # a video, and a video with an image
        batch = batch_of(golden, number)
        inputs = model.compose(batch, model.encoder(batch.visuals))
        logits = model.llm.head(model.llm(inputs.embeds, inputs.mask, inputs.positions))
        expected = golden.tensors[f"case{number}/{scheme}/logits"]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    stored = load_file(sources / layout / "model.safetensors")
    assert report["used"].keys() == stored.keys()
    assert report["facts"]["video_token_id"] == 123
    state = model.state_dict()
    for name, ours in report["used"].items():
        assert torch.equal(state[ours], stored[name].float())


def change(**fields):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return apply


def edit(function):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        function(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def short_sections(folder):
    no_weights(folder)
    rope = {"type": "mrope", "mrope_section": [4, 6, 5]}
    change(rope_scaling=rope)(folder)


NAMED = ["--rotary", "videorope"]
#: What is spoilt in the folder, the further words, and what the message has.
MISTAKES = {
    "no scheme": (no_weights, [], ["--rotary", "vanilla, tad, mrope, videorope", "config.json"]),
    "no such scheme": (no_weights, ["--rotary", "hope"], ["--rotary hope", "vanilla, tad"]),
    "sections": (short_sections, NAMED, ["[4, 6, 5]", "add up to 16", "head size 32"]),
    "a key more": (
        edit(lambda t: t.update({"visual.more": torch.ones(1)})),
        NAMED,
        ["1 of its keys have no place", "visual.more"],
    ),
    "a key less": (
        edit(lambda t: t.pop("visual.merger.mlp.2.bias")),
        NAMED,
        ["1 parameters of the model are not in it", "projector.linear_2.bias"],
    ),
    "another size": (
        change(intermediate_size=64),
        NAMED,
        ["different shape in the model", "mlp.down_proj"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, sources, tmp_path, capsys):
    spoil, words, says = MISTAKES[name]
    source = shutil.copytree(sources / "4.45", tmp_path / "in")
    spoil(source)
    code, error = run(source, tmp_path / "out", *words, capsys=capsys)
    assert code == 2
    assert error.count("\n") == 1
    for part in says:
        assert part in error
    assert not (tmp_path / "out").exists()


def test_a_layout_with_one_scheme_takes_no_other(tmp_path, capsys):
    config = {"architectures": ["LlavaNextForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, error = run(tmp_path, tmp_path / "out", "--rotary", "mrope", capsys=capsys)
    assert code == 2
    assert "--rotary mrope names no scheme of checkpoints in the layout llava_next" in error


def test_the_imported_model_answers(sources, golden, tmp_path):
    """Also in bfloat16, the dtype of the checkpoint, and after it is saved once more."""
    words = ["--rotary", "videorope"]
    model = imported(sources / "4.45", tmp_path / "out", *words)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "again")
    again = VideoLanguageModel.from_pretrained(tmp_path / "again").eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    batch = batch_of(golden, 1)
    assert torch.equal(model.generate(batch, **options), again.generate(batch, **options))


@pytest.mark.parametrize("layout", ["written", "in memory", "flat"])
@torch.no_grad()
def test_qwen2_5_vl_is_that_of_transformers(layout, tmp_path):
    """Its own positions are those of transformers, too: seconds become whole positions."""
    theirs, folder = (
        randomise(Qwen2_5_VLForConditionalGeneration(qwen2_5_config())),
        tmp_path / "in",
    )
    theirs.save_pretrained(folder)
    if layout == "in memory":
        rename(folder, in_memory)
    if layout == "flat":
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config") | {"model_type": "qwen2_5_vl"}
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        (folder / "config.json").write_text(json.dumps(config | text))
    model = imported(folder, tmp_path / "out")
    assert model.rotary.tokens_per_second == 3

    shape = (4, 3, 16, 24)
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    visual = Visual(frames, VisualInfo(seconds=(0.0, 0.25, 0.5, 0.75)))
    ids = [5, 6, 3, *[48] * 12, 4, 7, 8]  # 3: start, 48: video, 4: end
    batch = make_batch([5, 6, 3, VISUAL_SLOT, 4, 7, 8], frames, [4])
    batch.infos = [visual.info]
    inputs = model.compose(batch, model.encoder([visual]))
    logits = model.llm.head(model.llm(inputs.embeds, inputs.mask, inputs.positions))
    # Floor of 0.5 s * 3 = 1 for the second step; text goes on behind the largest, column 2.
    steps, rows, columns = [0] * 6 + [1] * 6, [0, 0, 0, 1, 1, 1] * 2, [0, 1, 2] * 4
    axes = [[0, 1, 2, *(3 + n for n in axis), 6, 7, 8] for axis in (steps, rows, columns)]
    assert inputs.positions[1:, 0].tolist() == axes
    grid = torch.tensor([[2, 4, 6]])
    patches = cut_patches(frames, Steps(0, 0, 2), model.encoder.cut)
    expected = theirs(
        torch.tensor([ids]),
        pixel_values_videos=patches,
        video_grid_thw=grid,
        position_ids=torch.tensor(axes)[:, None],
    ).logits
    assert_near(logits, expected)


def qwen2_5_config():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    return Qwen2_5_VLConfig(
        vision_config={
            **{"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48},
            **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
            **{"out_hidden_size": 32, "tokens_per_second": 3},
        },
        text_config={**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        **{"image_token_id": 49, "video_token_id": 48, "vision_start_token_id": 3},
    )
