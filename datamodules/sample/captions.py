"""Captions for the text tower: one visual and a long text about it, without an LLM.

[{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "A red bike ..."}]

input_ids  SLOT
prompt_ids <|start|> A red bike ... <|end|>    at most as many tokens as the text tower reads
"""

from collections.abc import Sequence

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.errors import BadSampleError
from datamodules.sample.conversation import ConversationEncoder, EncodedConversation, Turn
from datamodules.sample.outline import Outline


class CaptionEncoder(ConversationEncoder):
    """Encodes the answers of a conversation as the caption of its one visual.

    Cuts a long caption at the end and ignores the questions. Uses only the arguments
    `prompt_tokenizer` and `max_prompt_length`.
    """

    def __call__(
        self, turns: Sequence[Turn], prompt_with_answers: bool | None = None
    ) -> EncodedConversation:
        """Encodes the caption. Ignores `prompt_with_answers`: the prompt is always the answers.

        Raises:
            BadSampleError: not_one_visual.
        """
        asked = " ".join(turn.text for turn in turns if turn.role != "assistant")
        if (visuals := asked.count("<image>") + asked.count("<video>")) != 1:
            raise BadSampleError("not_one_visual", f"{visuals} visuals for one caption")
        answers = " ".join(turn.text for turn in turns if turn.role == "assistant")
        caption = self.prompt([Turn("user", answers)])
        return EncodedConversation([VISUAL_SLOT], [IGNORE_INDEX], caption)

    def outlined(self, outline: Outline) -> EncodedConversation:
        """Returns a caption of the maximum length, independent of `outline.words`.

        Raises:
            ValueError: the outline does not have exactly one visual.
        """
        if len(outline.visuals) != 1:
            raise ValueError(f"{len(outline.visuals)} visuals for one caption: a sample has one")
        prompt = [1] * self.max_prompt_length
        return EncodedConversation([VISUAL_SLOT], [IGNORE_INDEX], prompt)
