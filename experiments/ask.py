"""ropelab-ask: answers a question about videos and images, word by word.

ropelab-ask models/mine clip.mp4 "What happens?"
ropelab-ask models/mine before.jpg after.jpg "What has changed?" --device cpu
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TextStreamer

from datamodules.errors import BadSampleError
from datamodules.processor import Processor, with_sampling
from datamodules.sample.conversation import VISUALS, ConversationEncoder, Turn
from datamodules.visuals.frames import is_video
from experiments.console.bars import no_bars_in_files
from experiments.evaluate import load
from experiments.export import read_config
from experiments.run.files import printable
from experiments.run.process import end_with_the_reader, run_alone
from lightning_modules.callbacks.memory import is_out_of_memory
from lightning_modules.model import VideoLanguageModel


def main(arguments: Sequence[str] | None = None) -> None:
    run_alone("ropelab-ask")
    end_with_the_reader()
    options = _parser().parse_args(arguments)
    no_bars_in_files()
    try:
        ask(**vars(options))
    except (ValueError, OSError, BadSampleError) as error:
        sys.exit(f"ropelab-ask: {printable(str(error).splitlines()[0])}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("ropelab-ask: out of memory: set a smaller --num-frames, or another --device")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell has it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("ropelab-ask", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of ropelab-export, or run directory")
    parser.add_argument(
        "words",
        nargs="+",
        metavar="FILE | QUESTION",
        help="any number of videos and images, and then the question; it may say with the words "
        "<video> and <image> where each file belongs, or else all files stand before it",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--num-frames", type=int, metavar="N", help="frames of a video (default: as in training)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU, if there is one)")
    return parser


def ask(
    model: Path,
    words: Sequence[str],
    max_new_tokens: int = 256,
    num_frames: int | None = None,
    device: str | None = None,
) -> str:
    """Prints the answer while it is generated, and returns it. The arguments are the program's.

    Raises:
        ValueError: `model` is no model, there is no question, or an option does not fit.
        BadSampleError: a file cannot be read.
    """
    # 1. The question
    files, question = split_words(words)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; set it to 1 or more")
    place = choose_device(device)

    # 2. The model, and the files as it reads them
    processor = open_processor(model, {} if num_frames is None else {"num_frames": num_frames})
    batch = processor([[{"role": "user", "content": question}]], [files])
    network = open_model(model)

    # 3. The answer
    answer = Answer(processor.tokenizer)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, **processor.generation}
    network.to(device=place)  # pyright: ignore[reportCallIssue]
    network.generate(batch.to(place), streamer=answer, **options)
    return answer.text


def split_words(words: Sequence[str]) -> tuple[list[Path], str]:
    """Returns the files, and the question with one word <video> or <image> for each.

    Raises:
        ValueError: the last word is no question, or another one is no file.
    """
    *names, question = words
    suffix = question.rpartition(".")[2].lower()
    if not question.strip() or os.path.exists(question) or suffix in VISUALS:
        raise ValueError(f"{question!r} is no question: write one in quotes after the files")
    for name in names:
        if not os.path.isfile(name):
            raise ValueError(f"there is no file {name!r}; write the question in quotes, at the end")
    if not ConversationEncoder.count_slots(Turn("user", question)):
        slots = ["<video>" if is_video(name) else "<image>" for name in names]
        question = "\n".join([*slots, question])
    return [Path(name) for name in names], question


def choose_device(name: str | None) -> torch.device:
    """Returns the named device, or by default the first GPU, or the CPU if there is none.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def open_processor(model: Path, sampling: Mapping[str, Any]) -> Processor:
    """Returns the processor of an exported model or of a run.

    Args:
        sampling: settings of the frame sampler that replace those of the training.

    Raises:
        ValueError: the folder holds neither, or the sampler has no such setting.
    """
    if not model.is_dir():
        raise ValueError(f"there is no folder {str(model)!r}")
    if (model / "config.json").is_file():
        return Processor.from_pretrained(model, **sampling)
    if not (model / "config.yaml").is_file():
        raise ValueError(f"{model} is neither a run directory nor a folder of ropelab-export")
    data = read_config(model)["data"]
    return Processor(with_sampling(data["frames"], sampling), data["conversation"])


def open_model(model: Path) -> VideoLanguageModel:
    """Returns the exported model, or that of the newest checkpoint of a run, in eval mode.

    Raises:
        ValueError: there are no weights, or they are damaged.
    """
    try:
        return load(model)[0]
    except SafetensorError as error:
        raise ValueError(f"the weights in {model} are damaged: {error}") from None


class Answer(TextStreamer):
    """Prints an answer while it is generated, as soon as a word is complete.

    Attributes:
        text: what has been printed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()  # templates differ in the space before it
        self.text += text
        super().on_finalized_text(text, stream_end)


if __name__ == "__main__":
    main()
