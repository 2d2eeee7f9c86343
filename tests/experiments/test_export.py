"""ropelab-export: the model opens elsewhere, reads the same question and gives equal logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from datamodules.batch import IGNORE_INDEX
from datamodules.instruct import decode_sample
from datamodules.preference import decode_pair
from datamodules.processor import Processor
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from experiments.evaluate import load
from experiments.export import export, main
from experiments.run.compose import build, plain
from lightning_modules.lora import is_lora, lora_layers, without_lora
from lightning_modules.model import VideoLanguageModel

RECIPE = ["experiment=ppllava_vicuna7b_multi_image", "scale=tiny"]
QUESTIONS = [
    [{"role": "user", "content": "<video>\nWhat color is the square?"}],
    [{"role": "user", "content": "<image>\nand <image>\nWhich digit is in both images?"}],
    [{"role": "user", "content": "Which number comes after 3?"}],
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[list[Path]]:
    """Returns a clip and two images."""
    folder = tmp_path_factory.mktemp("files")
    frames, _, _ = draw_frames(1, 12)
    (folder / "clip.mp4").write_bytes(encode_video(frames))
    for name, frame in zip("ab", frames, strict=False):
        (folder / f"{name}.jpg").write_bytes(encode_image(frame))
    return [[folder / "clip.mp4"], [folder / "a.jpg", folder / "b.jpg"], []]


def leave_run(config, folder: Path) -> Path:
    """A run directory as a training leaves it. Its weights are random."""
    torch.manual_seed(0)
    module = build(config.module, "module")(model=plain(config.model))
    module.configure_model()
    for name, parameter in module.named_parameters():
        if is_lora(name):  # a fresh one changes nothing
            parameter.data.normal_(std=0.1)
    checkpoint = {"global_step": 7, "state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    (folder / "command.txt").write_text(f"ropelab-train {' '.join(RECIPE)}\n")
    done = {"steps": 7, "samples": 112, "metrics": {"val/loss": 1.5}}
    (folder / "done.json").write_text(json.dumps(done))
    return folder


@pytest.fixture
def run(compose, tmp_path) -> Path:
    config = compose([*RECIPE, "name=a", "run_name=b"], tmp_path / "run")
    return leave_run(config, tmp_path / "run")


@pytest.fixture
def run_with_lora(compose, tmp_path) -> Path:
    words = [*RECIPE, "name=a", "run_name=b", "tuning=lora", "tuning.lora.rank=4"]
    config = compose([*words, "tuning.lora.alpha=8"], tmp_path / "run")
    return leave_run(config, tmp_path / "run")


def logits_of(model: VideoLanguageModel, processor: Processor, files) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(processor(QUESTIONS, files))
        return model.llm.head(output.hidden[output.inputs.mask])


def test_loading_it_elsewhere_gives_the_same_logits(run, files, tmp_path):
    """In a process that starts in another directory and knows only the folder."""
    model = export(run, tmp_path / "out")
    expected = logits_of(model, Processor.from_pretrained(tmp_path / "out"), files)
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from datamodules.processor import Processor
from lightning_modules.model import VideoLanguageModel
from tests.experiments.test_export import logits_of
folder = {str(tmp_path / "out")!r}
files = [list(map(Path, row)) for row in {[[str(p) for p in row] for row in files]!r}]
processor = Processor.from_pretrained(folder)
logits = logits_of(VideoLanguageModel.from_pretrained(folder), processor, files)
torch.save(logits, "logits.pt")
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "run").rename(tmp_path / "gone")
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", program], cwd=elsewhere, env=env, check=True)
    assert torch.equal(torch.load(elsewhere / "logits.pt"), expected)


def test_what_is_written_names_its_stages_and_its_recipe(run, tmp_path):
    export(run, tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rotary"]["_target_"].endswith("VanillaRope")
    assert config["pooler"]["_target_"].endswith("PromptGuidedPooler")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "ropelab"
    assert f"ropelab-train {' '.join(RECIPE)}" in card
    assert "| val/loss | 1.5 |" in card
    assert "7 steps, 112 samples" in card
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_a_question_is_read_as_it_was_in_training(run, files, tmp_path):
    """Up to the answer, the ids equal those of a conversation with an answer."""
    export(run, tmp_path / "out")
    processor = Processor.from_pretrained(tmp_path / "out")
    asked = processor(QUESTIONS, files)
    answers = [[*question, {"role": "assistant", "content": "7"}] for question in QUESTIONS]
    answered = processor(answers, files).questions()
    for row in range(len(asked)):
        assert torch.equal(
            asked.input_ids[row][asked.attention_mask[row]],
            answered.input_ids[row][answered.attention_mask[row]],
        )
    assert (asked.labels == IGNORE_INDEX).all()
    assert torch.equal(asked.pixels, answered.pixels)
    model = VideoLanguageModel.from_pretrained(tmp_path / "out").eval()
    texts = processor.decode(model.generate(asked, max_new_tokens=3, **processor.generation))
    assert len(texts) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run, out: out.mkdir(), "already exists"),
        (lambda run, out: (run / "config.yaml").unlink(), "no config.yaml"),
        (lambda run, out: (run / "checkpoints" / "last.ckpt").unlink(), "no checkpoint"),
        (lambda run, out: (run / "config.yaml").write_text(HOSTILE), "refused"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(spoil, says, run, tmp_path, capsys):
    out = tmp_path / "out"
    spoil(run, out)
    with pytest.raises(SystemExit, match=says) as stop:
        main([str(run), str(out)])
    assert "\n" not in str(stop.value.code)
    assert not out.exists() or not any(out.iterdir())


HOSTILE = """
data:
  frames: {_target_: os.system, command: "true"}
  conversation: {_target_: datamodules.sample.conversation.ConversationEncoder}
"""


def test_files_and_words_must_match(run, files, tmp_path):
    export(run, tmp_path / "out")
    processor = Processor.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"1 words .* 2 files"):
        processor(QUESTIONS[:1], files[1:2])


@pytest.mark.parametrize("lora", ["merged", "apart"])
def test_lora_is_folded_in_or_beside_and_says_the_same(lora, run_with_lora, files, tmp_path):
    expected, _ = load(run_with_lora, None)
    model = export(run_with_lora, tmp_path / "out", lora=lora)
    again = VideoLanguageModel.from_pretrained(tmp_path / "out")
    processor = Processor.from_pretrained(tmp_path / "out")
    logits = logits_of(again, processor, files)
    assert torch.equal(logits, logits_of(model, processor, files))
    assert torch.allclose(logits, logits_of(expected, processor, files), atol=1e-5)
    with without_lora(expected):
        assert not torch.allclose(logits, logits_of(expected, processor, files), atol=1e-2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(map(is_lora, stored)) == (lora == "apart")
    assert (again.config.lora is not None) == (lora == "apart")


def test_peft_reads_the_adapter_beside_a_plain_llm(run_with_lora, tmp_path):
    model = export(run_with_lora, tmp_path / "out", lora="apart")
    plain_llm = AutoModelForCausalLM.from_config(model.llm.lm.config)
    adapted = PeftModel.from_pretrained(plain_llm, tmp_path / "out" / "adapter")
    own = {n: p for n, p in model.llm.lm.named_parameters() if is_lora(n)}
    theirs = {n: p for n, p in adapted.base_model.model.named_parameters() if is_lora(n)}
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    scale = {layer.scaling["default"] for _, layer in lora_layers(adapted)}
    assert scale == {layer.scaling["default"] for _, layer in lora_layers(model)} == {2.0}


def test_tiles_are_cut_as_in_training(compose, tmp_path):
    """The same image, through the processor, through the stream, and as one of a pair."""
    words = [*RECIPE, "name=a", "run_name=b", "tiles=llava_next"]
    export(leave_run(compose(words, tmp_path / "run"), tmp_path / "run"), tmp_path / "out")
    processor = Processor.from_pretrained(tmp_path / "out")
    image = encode_image(Image.new("RGB", (90, 40), "red"))
    (tmp_path / "a.jpg").write_bytes(image)
    question = "<image>\nWhat color is it?"
    asked = processor([[{"role": "user", "content": question}]], [[tmp_path / "a.jpg"]])
    assert asked.infos[0].tiles is not None
    frames, conversation = processor._frames, processor.conversation
    turns = [{"from": "human", "value": question}]
    answered = {"conversations": [*turns, {"from": "gpt", "value": "red"}]}
    pair = {"conversations": turns, "chosen": "red", "rejected": "blue"}
    raw = {"__key__": "k", "__url__": "u", "jpg": image}
    for decode, entry in ((decode_sample, answered), (decode_pair, pair)):
        sample = decode({**raw, "json": json.dumps(entry).encode()}, frames, conversation)
        (visual,) = asked.visuals
        assert sample.visuals[0].info == visual.info
        assert torch.equal(sample.visuals[0].frames, visual.frames)
