"""ropelab-ask: the answer is streamed, and mistakes are one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamodules.processor import Processor
from datamodules.sample.tokenizer import tiny_tokenizer
from datamodules.shards.synthetic import draw_frames, encode_image, encode_video
from experiments import ask
from experiments.export import export
from lightning_modules.model import VideoLanguageModel
from tests.experiments.test_export import RECIPE, leave_run

QUESTION = "What happens?"


@pytest.fixture(scope="module")
def folder(compose, tmp_path_factory) -> Path:
    """Returns a folder with a run, its export, a clip, a damaged clip and an image."""
    folder = tmp_path_factory.mktemp("ask")
    run = leave_run(compose([*RECIPE, "name=a", "run_name=b"], folder / "run"), folder / "run")
    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    for name, weights in saved["state_dict"].items():
        if "projector.linear_2" in name:  # random visual tokens are so large that nothing is said
            weights.mul_(0.01)
    torch.save(saved, checkpoint)
    export(run, folder / "model")
    frames, _, _ = draw_frames(1, 12)
    clip = encode_video(frames)
    (folder / "clip.mp4").write_bytes(clip)
    (folder / "cut.mp4").write_bytes(clip[:2000])
    (folder / "a.jpg").write_bytes(encode_image(frames[0]))
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def answer_of(content: str, files: list[str], **sampling: int) -> str:
    """Returns the first 6 tokens of the exported model's answer, as Python gives them."""
    processor = Processor.from_pretrained("model")
    batch = processor([[{"role": "user", "content": content}]], [files], **sampling)
    model = VideoLanguageModel.from_pretrained("model")
    options = {"max_new_tokens": 6, "do_sample": False, **processor.generation}
    return processor.decode(model.generate(batch, **options))[0]


@pytest.mark.parametrize("model", ["model", "run"])
@pytest.mark.parametrize(
    ("files", "question", "content"),
    [
        (["clip.mp4"], QUESTION, f"<video>\n{QUESTION}"),
        (["clip.mp4", "a.jpg"], QUESTION, f"<video>\n<image>\n{QUESTION}"),
        (["a.jpg", "clip.mp4"], "Is <image> in <video>?", "Is <image> in <video>?"),
        ([], QUESTION, QUESTION),
    ],
)
def test_the_answer_alone_is_printed(model, files, question, content, capsys):
    ask.main([model, *files, question, "--max-new-tokens", "6", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert shown.endswith("\n")
    assert shown.strip() == answer_of(content, files) != ""


def test_the_number_of_frames_is_that_of_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(
        VideoLanguageModel, "generate", lambda self, batch, **_: seen.append(batch.shapes)
    )
    for words in ([], ["--num-frames", "3"]):
        ask.main(["model", "clip.mp4", QUESTION, *words])
    assert [shapes[0][0] for shapes in seen] == [8, 3]


def test_a_word_is_printed_as_soon_as_it_is_complete(capsys):
    tokenizer = tiny_tokenizer()
    answer = ask.Answer(tokenizer)
    answer.put(torch.zeros(1, 0, dtype=torch.long))  # the prompt: there are embeddings, no ids
    shown = []
    for number in tokenizer(" red card left", add_special_tokens=False)["input_ids"]:
        answer.put(torch.tensor([number]))
        shown.append(capsys.readouterr().out)
    answer.put(torch.tensor([tokenizer.eos_token_id]))
    answer.end()
    assert shown[1].strip()  # releases of transformers print a word at its end or at the next one
    assert "red card left".startswith("".join(shown).strip())
    assert "".join(shown) + capsys.readouterr().out == "red card left\n"
    assert answer.text == "red card left"


def test_a_fresh_process_prints_nothing_but_the_answer(folder):
    command = [sys.executable, "-m", "experiments.ask", "model", "clip.mp4", QUESTION]
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    words = ["--max-new-tokens", "6"]
    result = subprocess.run([*command, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == answer_of(f"<video>\n{QUESTION}", ["clip.mp4"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none", "clip.mp4", QUESTION], "there is no folder 'none'"),
        ([".", "clip.mp4", QUESTION], "neither a run directory nor a folder of ropelab-export"),
        (["model", "cut.mp4", QUESTION], r"video_unreadable: cut\.mp4: "),
        (["model", "gone.mp4", QUESTION], r"there is no file 'gone\.mp4'"),
        (["model", "clip.mp4", "What", "happens?"], "no file 'What'; write the question in quotes"),
        (["model", "clip.mp4"], r"'clip\.mp4' is no question: write one in quotes"),
        (["model", "gone.mp4"], r"'gone\.mp4' is no question"),
        (["model", "clip.mp4", " "], "' ' is no question"),
        (["model", "clip.mp4", "In <video> and <image>?"], "2 words .* but there are 1 files"),
        (["model", "clip.mp4", "a" * 5000, "--num-frames", "0"], "num_frames is 0; set it to"),
        (["model", "clip.mp4", QUESTION, "--max-new-tokens", "0"], "--max-new-tokens is 0; set it"),
        (["model", "clip.mp4", QUESTION, "--device", "tpu"], "--device tpu: Expected one of cpu"),
        (["damaged", "clip.mp4", QUESTION], "the weights in damaged are damaged: "),
    ],
)
def test_mistakes_are_one_line(words, says, folder):
    if words[0] == "damaged":
        shutil.copytree("model", "damaged")
        weights = folder / "damaged" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:20_000])
    with pytest.raises(SystemExit, match=f"^ropelab-ask: .*{says}") as stop:
        ask.main(words)
    assert "\n" not in str(stop.value.code)
