"""The processor of a saved model: turns conversations and files into a batch.

processor = Processor.from_pretrained(folder)
model = VideoLanguageModel.from_pretrained(folder)
batch = processor([[{"role": "user", "content": "<video>\\nWhat is it?"}]], [["clip.mp4"]])
print(processor.decode(model.generate(batch, **processor.generation)))
"""

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.batch import VideoBatch
from datamodules.common.spec import build, class_name, resolve
from datamodules.instruct import Sample, collater
from datamodules.sample.conversation import ConversationEncoder, Turn
from datamodules.visuals.frames import FrameReader

_PACKAGE = "datamodules"
_FILE = "processor.json"
_PROMPT_TOKENIZER = "prompt_tokenizer"


class Processor:
    """Turns conversations and files into a `VideoBatch`, in the same way as in training.

    Args:
        frames, conversation: specs like the nodes `data.frames` and `data.conversation` of a
            run: class paths under `_target_`, and arguments.

    Attributes:
        generation: token ids to pass to `VideoLanguageModel.generate`.
    """

    def __init__(self, frames: Mapping[str, Any], conversation: Mapping[str, Any]):
        self._spec = {"frames": dict(frames), "conversation": dict(conversation)}
        self._frames: FrameReader = build(frames, _PACKAGE, FrameReader)
        self.conversation: ConversationEncoder = build(conversation, _PACKAGE, ConversationEncoder)
        self.generation = {
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the LLM."""
        return self.conversation.tokenizer

    def __call__(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        visuals: Sequence[Sequence[str | Path]] = (),
        **sampling: Any,
    ) -> VideoBatch:
        """Returns a batch with one row per conversation.

        If the last turn is a question, the row ends where the model's answer begins.

        Args:
            conversations: messages, `{"role": "user", "content": "<video>\\n…"}`, with the word
                <video> or <image> in the place of each file of `visuals`.
            visuals: the files of each conversation, in the order of those words.
            sampling: settings of the frame sampler for this call, such as `num_frames=16`.

        Raises:
            ValueError: the numbers of files and words differ, or the sampler has no such setting.
            BadSampleError: a file cannot be read.
        """
        files = visuals or [()] * len(conversations)
        frames = with_sampling(self._spec["frames"], sampling)
        reader = build(frames, _PACKAGE, FrameReader) if sampling else self._frames
        samples = [
            self._read(
                [Turn(m["role"], m["content"]) for m in messages], list(map(Path, paths)), reader
            )
            for messages, paths in zip(conversations, files, strict=True)
        ]
        return collater(self.conversation)(samples)

    def decode(self, ids: Int[Tensor, "b l"]) -> list[str]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `processor.json`, the tokenizer, and a subfolder with the prompt tokenizer."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        self.conversation.prompt_tokenizer.save_pretrained(folder / _PROMPT_TOKENIZER)
        (folder / _FILE).write_text(json.dumps(self._spec, indent=1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **sampling: Any) -> "Processor":
        """Loads what `save_pretrained` wrote. Builds only classes of `datamodules`.

        Args:
            sampling: settings of the frame sampler that replace those of the training, such as
                `num_frames=16`.

        Raises:
            ValueError: the file does not exist or names other classes, or the sampler has no such
                setting.
        """
        folder = Path(folder)
        if not (folder / _FILE).is_file():
            raise ValueError(f"no {_FILE} in {folder}: ropelab-export writes one")
        spec = json.loads((folder / _FILE).read_text())
        own = {"tokenizer": str(folder), "prompt_tokenizer": str(folder / _PROMPT_TOKENIZER)}
        return cls(with_sampling(spec["frames"], sampling), spec["conversation"] | own)

    def _read(self, turns: Sequence[Turn], paths: Sequence[Path], reader: FrameReader) -> Sample:
        words = sum(self.conversation.count_slots(turn) for turn in turns)
        if words != len(paths):
            raise ValueError(
                f"the text has {words} words <video> or <image>, but there are {len(paths)} files"
            )
        read = [reader.read(path.name, path.read_bytes()) for path in paths]
        ends_with_answer = bool(turns) and turns[-1].role == "assistant"
        encode = self.conversation if ends_with_answer else self.conversation.ask
        key = " ".join(path.name for path in paths)
        return Sample(key, encode(turns), read)


def with_sampling(frames: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the spec of a `FrameReader` with other settings of its sampler.

    Raises:
        ValueError: the sampler has no such setting; the message lists those that it has.
    """
    if not sampling:
        return dict(frames)
    sampler = frames.get("sampler") or {}
    if "_target_" not in sampler:
        raise ValueError(f"the frames are read without a sampler, so there is no {min(sampling)}")
    known = signature(resolve(sampler["_target_"], _PACKAGE)).parameters
    for name in sampling:
        if name not in known:
            raise ValueError(f"{class_name(sampler)} has no {name}: set {', '.join(known)}")
    return {**frames, "sampler": {**sampler, **sampling}}
