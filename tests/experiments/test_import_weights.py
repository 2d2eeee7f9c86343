"""ropelab-import: messages about weights that do not fit, its output, and its memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from experiments import import_weights
from tests.helpers.published import (
    TEXT,
    VISION,
    imported,
    make_llava_next,
    make_llava_onevision,
    run,
    write,
)


@pytest.fixture(scope="module")
def llava_next():
    return make_llava_next()


@pytest.fixture(scope="module")
def llava_onevision():
    return make_llava_onevision()


def edit(change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")


def lost_shard(folder):
    placed = {"language_model.model.norm.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def outside(folder):
    index = {"weight_map": {"norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unlike(field, value):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))

    return apply


NORM = "language_model.model.norm.weight"
MISTAKES = {
    "missing": (edit(lambda t: t.pop(NORM)), ["1 parameters", "llm.lm.model.norm.weight", "unfi"]),
    "extra": (edit(lambda t: t.update(more=torch.ones(1))), ["1 of its keys", "more", "unused"]),
    "shape": (
        edit(lambda t: t.update({NORM: torch.ones(5)})),
        [NORM, "(5,)", "llm.lm.model.norm.weight", "(32,)"],
    ),
    "cut": (cut, ["model.safetensors is truncated"]),
    "code": (pickled, ["code in weights is never run"]),
    "lost_shard": (lost_shard, ["model-1.safetensors is missing"]),
    "outside": (outside, ["outside", "../other"]),
    "unknown": (unlike("architectures", ["Other"]), ["Other", "LlavaNextForCond"]),
    "projector": (unlike("projector_hidden_act", "relu"), ["projector_hidden_act", "relu"]),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, llava_next, tmp_path, capsys):
    source = write(llava_next, tmp_path / "in")
    spoil, says = MISTAKES[mistake]
    spoil(source)
    capsys.readouterr()
    code = import_weights.main([str(source), str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for word in says:
        assert word in printed.err
    assert "code ran" not in printed.out
    assert not (tmp_path / "out").exists()


def test_tied_weights_may_be_stored_twice_but_not_differ(llava_onevision, tmp_path, capsys):
    embed, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    source = write(llava_onevision, tmp_path / "in")
    edit(lambda t: t.update({head: t[embed].clone()}))(source)
    model = imported(source, tmp_path / "out")
    assert model.llm.lm.lm_head.weight is model.llm.lm.get_input_embeddings().weight
    edit(lambda t: t.update({head: t[embed] + 1}))(source)
    capsys.readouterr()
    code, error = run(source, tmp_path / "other", capsys=capsys)
    assert code == 2
    assert f"{head} and {embed} differ" in error or f"{embed} and {head} differ" in error


def test_what_is_left_over_may_be_allowed(llava_next, tmp_path):
    source = write(llava_next, tmp_path / "in")
    edit(lambda t: (t.pop(NORM), t.update(more=torch.ones(1))))(source)
    model = imported(
        source, tmp_path / "out", "--allow-unused", "m*", "--allow-unfilled", "llm.lm.model.norm.*"
    )
    assert torch.equal(model.llm.lm.model.norm.weight, torch.ones(32)), (
        "unfilled parameters are as in a new LLM"
    )
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["unused"] == ["more"]
    assert report["unfilled"] == ["llm.lm.model.norm.weight"]


def test_a_hub_id_that_cannot_be_read_and_a_full_folder(llava_next, tmp_path, capsys):
    code, error = run("nobody/nothing", tmp_path / "out", capsys=capsys)
    assert code == 2
    assert "nobody/nothing" in error
    assert error.count("\n") == 1
    source = write(llava_next, tmp_path / "in")
    capsys.readouterr()
    code, error = run(source, source, capsys=capsys)
    assert code == 2
    assert "not empty" in error


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_dtype_is_kept_or_cast(dtype, llava_next, tmp_path):
    source = write(llava_next, tmp_path / "in")
    edit(lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))(source)
    (source / "tokenizer.json").write_text("{}")
    words = ["--dtype", dtype] if dtype else []
    model = imported(source, tmp_path / "out", *words)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype or 'bfloat16'}"}
    norm = load_file(source / "model.safetensors")[NORM]
    assert torch.equal(model.llm.lm.model.norm.weight, norm.to(model.dtype))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def resident_mb(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"]], ids=["kept", "cast"])
def test_weights_are_never_in_memory_twice(words, tmp_path, run_ranks):
    """98 MB in ten shards. The peak includes the mapped pages of the files."""
    config = LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama", "vocab_size": 32000, "hidden_size": 384},
    )
    source = LlavaNextForConditionalGeneration(config)
    if words:
        source = source.bfloat16()
    source.save_pretrained(tmp_path / "in", max_shard_size="10MB")
    stored_mb = sum(p.nbytes for p in source.parameters()) / 2**20
    del source
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2

    def grown(rank):
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        assert import_weights.main([str(tmp_path / "in"), str(tmp_path / "out"), *words]) == 0
        return resident_mb("VmHWM") - before

    (peak_mb,) = run_ranks(1, grown)
    written_mb = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) / 2**20
    needed_mb = stored_mb + (written_mb if words else 0)
    assert written_mb > 90
    assert peak_mb < needed_mb + written_mb / 2
