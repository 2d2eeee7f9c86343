"""Weights, tokenizers and saved models from strangers: opening them runs none of their code."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from datamodules.processor import Processor
from datamodules.sample.tokenizer import load_tokenizer, tiny_tokenizer
from experiments.run.compose import build, plain
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig


@pytest.fixture(autouse=True)
def answers_yes(monkeypatch):
    """The user at the terminal answers yes to every question of transformers."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def leave_code(folder: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
    (folder / "evil.py").write_text(code + "class Thing: pass\n")


def was_run(tmp_path: Path) -> bool:
    return (tmp_path / "mark").exists()


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    folder = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(folder)
    leave_code(folder, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Thing", "auto_map": {"AutoTokenizer": [None, "evil.Thing"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ValueError):  # apart from its own class, it is a plain one
        load_tokenizer(str(folder))
    assert not was_run(tmp_path)


def test_code_beside_an_llm_is_not_run(tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    leave_code(folder, tmp_path)
    config = LlamaConfig().to_dict() | {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "evil.Thing", "AutoModelForCausalLM": "evil.Thing"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError)):
        CausalLM(source=str(folder))
    assert not was_run(tmp_path)


@pytest.fixture(scope="module")
def saved(compose, tmp_path_factory) -> Path:
    """A model with its processor, as ropelab-export writes them."""
    folder = tmp_path_factory.mktemp("saved")
    config = compose(["experiment=resume_probe"], folder)
    build(config.module, "module")(model=plain(config.model))
    VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).save_pretrained(folder)
    data = plain(config.data)
    Processor(data["frames"], data["conversation"]).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(saved, tmp_path) -> Path:
    folder = shutil.copytree(saved, tmp_path / "theirs")
    leave_code(folder, tmp_path)
    return folder


def change(path: Path, changed) -> None:
    found = json.loads(path.read_text())
    changed(found)
    path.write_text(json.dumps(found))


STAGES = {
    "a class of another kind": (
        "rotary",
        "lightning_modules.loggers.csv.ResumableCSVLogger",
        "not a subclass of Rot",
    ),
    "a reader of files": (
        "encoder",
        "lightning_modules.checkpoint.weights._PlainReader",
        "is not a subclass of Encoder",
    ),
    "a pooler as the llm": (
        "llm",
        "lightning_modules.pooler.average.AveragePooler",
        "is not a subclass of Lang",
    ),
    "a walk": ("pooler", "lightning_modules.checkpoint.weights.torch.load", "there is no class"),
    "no text": ("pooler", ["evil"], "refused"),
}


@pytest.mark.parametrize(("stage", "target", "says"), STAGES.values(), ids=STAGES.keys())
def test_a_saved_model_builds_each_stage_of_its_kind(stage, target, says, theirs, tmp_path):
    spec = {"_target_": target, "save_dir": str(tmp_path / "mark"), "path": str(tmp_path / "mark")}
    change(theirs / "config.json", lambda config: config.update({stage: spec}))
    with pytest.raises(ValueError, match=says):
        VideoLanguageModel.from_pretrained(theirs)
    assert not was_run(tmp_path)


def test_code_beside_a_saved_model_is_not_run(theirs, tmp_path):
    maps = {"AutoModel": "evil.Thing", "AutoConfig": "evil.Thing"}
    change(theirs / "config.json", lambda config: config.update(auto_map=maps))
    change(
        theirs / "config.json",
        lambda config: config["llm"]["config"].update(
            auto_map={"AutoModelForCausalLM": f"{theirs}--evil.Thing"}
        ),
    )
    assert VideoLanguageModel.from_pretrained(theirs).llm.width > 0
    assert not was_run(tmp_path)


@pytest.mark.parametrize(
    ("node", "target", "says"),
    [
        (
            "frames",
            "datamodules.stream.reading.source.LocalFile",
            "is not a subclass of FrameReader",
        ),
        (
            "conversation",
            "datamodules.visuals.frames.UniformSampler",
            "is not a subclass of ConversationEncoder",
        ),
        ("frames", "datamodules.visuals.frames.os.system", "there is no class"),
        (
            "frames",
            "datamodules.stream.index.read_manifest",
            "not a class defined under datamodules",
        ),
        ("frames", "evil.Thing", "only classes under datamodules"),
    ],
)
def test_a_saved_processor_builds_only_what_reads(node, target, says, theirs):
    def changed(spec):
        spec[node] = {"_target_": target, "path": "x", "num_frames": 1}

    change(theirs / "processor.json", changed)
    with pytest.raises(ValueError, match=says):
        Processor.from_pretrained(theirs)
