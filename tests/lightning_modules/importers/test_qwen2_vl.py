"""Whole checkpoints of Qwen2-VL's layout, in the names and configs of transformers 4.45 and 5.x."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from lightning_modules.model import VideoLanguageModel
from tests.helpers.published import imported, rename, run
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
