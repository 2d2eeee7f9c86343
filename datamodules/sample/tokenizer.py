"""Tokenizers from the hub, a folder or a GGUF file, and a tiny built-in one without files."""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

#: For tokenizers without a template: the template of Vicuna and LLaVA v1 without the system
#: prompt, as in PPLLaVA. `default_template` adds the tokens that start a text (`<s>`). The
#: generation marks enclose the assistant's text.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    " {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)

_TINY_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_TINY_SPECIALS = ["<|start|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
_TINY_VOCABULARY = 2048

# Words that become one token, at the start of a text and after a space. Other words are split.
_TINY_CORPUS = """
what which who where when why how many much is are was were do does did can could will would
the a an this that these those it its there here in on at of to from with without before after
first last next left right top bottom middle between above below near behind inside outside
video videos image images picture pictures frame frames scene scenes clip clips moment shown
appears appear appeared see seen show shows describe answer question please choose option options
digit digits number numbers letter letters word words color colour red green blue yellow white black
orange purple brown grey square circle triangle line shape shapes object objects needle secret
person people man woman child dog cat bird car bike bus boat house tree street room table hand
moving moves standing sitting walking running playing holding looking eating going fast slow
yes no not only one two three four five six seven eight nine ten zero small large big old new
card cards
""".split()  # noqa: SIM905 - as a list it would be one word a line


def load_tokenizer(source: str | None) -> PreTrainedTokenizerFast:
    """Loads a fast tokenizer and makes sure it has a chat template and a padding token.

    Args:
        source: hub id, local folder, path of a `.gguf` file, or `None` for the built-in one.

    Raises:
        ValueError: no tokenizer can be loaded, or it has no fast version.
    """
    # Set this before workers are forked. Otherwise each worker prints a warning about the fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if source is None:
        return tiny_tokenizer()
    # Without this setting, transformers asks in the terminal whether to run a tokenizer's code.
    code: dict[str, Any] = {"trust_remote_code": False}
    if _needs_no_config(Path(source)):
        code["config"] = PreTrainedConfig()
    try:
        if source.endswith(".gguf"):
            file = Path(source).expanduser()
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, **code)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **code)
    except (OSError, ValueError, ImportError) as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(f"no tokenizer can be loaded from {source!r}: {line}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {source!r} has no fast version, which labels need")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = default_template(tokenizer)
    return tokenizer


def _needs_no_config(folder: Path) -> bool:
    """Returns whether the folder names the tokenizer's class, beside a model of unknown type.

    transformers also looks for the class in the config of the model. It warns if it does not know
    the model's type, as that of an exported model.
    """
    try:
        model = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        return model["model_type"] not in CONFIG_MAPPING and "tokenizer_class" in tokenizer
    except (OSError, ValueError, KeyError, TypeError):  # transformers says what is wrong
        return False


def default_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the chat template for a tokenizer that has none.

    The text starts with the same tokens as `tokenizer(text)`: `<s>` for Llama's tokenizer, nothing
    for Qwen's. LLaVA and PPLLaVA build Vicuna's prompts in the same way. A template that comes
    with a tokenizer is not changed, because it writes these tokens itself.
    """
    tokens = tokenizer.convert_ids_to_tokens(starting_ids(tokenizer))
    if tokens == [tokenizer.bos_token]:
        return "{{ bos_token }}" + DEFAULT_TEMPLATE
    return "".join(f"{{{{ {json.dumps(token)} }}}}" for token in tokens) + DEFAULT_TEMPLATE


def starting_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Returns the ids that `tokenizer(text)` adds before the text, such as `<s>`."""
    whole = list(tokenizer("a")["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    return next(whole[:n] for n in range(len(whole)) if whole[n : n + len(text)] == text)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most 2,048 tokens. The result is deterministic.

    Every digit is one token. A text is enclosed in `<|start|>` and `<|end|>`, as CLIP's text tower
    requires, unless `add_special_tokens=False`. `<|end|>` also ends a turn.
    """
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        min_frequency=1,
        special_tokens=_TINY_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [*_TINY_CORPUS, *(word.capitalize() for word in _TINY_CORPUS), *"0123456789"]
    bpe.train_from_iterator([spaced for word in words for spaced in (word, f" {word}")], trainer)
    start, end = (bpe.token_to_id(token) for token in ("<|start|>", "<|end|>"))
    bpe.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        additional_special_tokens=_TINY_SPECIALS[3:],
        chat_template=_TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
