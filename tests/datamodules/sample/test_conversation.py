"""Conversations: slots, labels only on answers, templates, and tokenizers."""

import subprocess
import sys

import pytest
from hydra.utils import instantiate
from transformers import AutoTokenizer

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT
from datamodules.errors import BadSampleError
from datamodules.sample.conversation import (
    ConversationEncoder,
    match_slots,
    parse_sample,
    read_turns,
)
from datamodules.sample.tokenizer import DEFAULT_TEMPLATE, load_tokenizer, tiny_tokenizer

TALK = [
    ("human", "<video>\nWhat is it?"),
    ("gpt", "A bike 57."),
    ("human", "and <image> this?"),
    ("gpt", "no"),
]
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content']|trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def turns(*talk):
    return read_turns({"conversations": [{"from": who, "value": text} for who, text in talk]})


def learnt(encoder, encoded) -> str:
    return encoder.tokenizer.decode([i for i in encoded.labels if i != IGNORE_INDEX])


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "A bike 57.<|end|>no<|end|>"),
        (CHATML, "A bike 57.<|end|>no<|end|>"),
        (DEFAULT_TEMPLATE, "A bike 57.<|end|>no<|end|>"),
        (LLAMA2, "A bike 57.<|end|>no<|end|>"),
    ],
)
def test_labels_stand_on_the_answers_and_their_end(template, expected):
    encoder = ConversationEncoder()
    if template:
        encoder.tokenizer.chat_template = template
    encoded = encoder(turns(*TALK))
    # except for spaces: a space that shares a token with the answer has a label
    assert learnt(encoder, encoded).replace(" ", "") == expected.replace(" ", "")
    assert len(encoded.labels) == len(encoded.input_ids)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)


def test_text_between_slots_is_kept_word_for_word(encoder):
    encoded = encoder(turns(*TALK))
    assert encoded.input_ids.count(VISUAL_SLOT) == 2
    text = [i for i in encoded.input_ids if i != VISUAL_SLOT]
    assert encoder.tokenizer.decode(text) == (
        "<|user|>\nWhat is it?<|assistant|>A bike 57.<|end|>"
        "<|user|>and  this?<|assistant|>no<|end|>"
    )


def test_an_answer_that_repeats_the_question_is_labelled_where_it_stands():
    encoder = ConversationEncoder()
    encoder.tokenizer.chat_template = CHATML
    encoded = encoder(turns(("human", "yes or no? yes"), ("gpt", "yes")))
    assert learnt(encoder, encoded) == "yes<|end|>"
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoder.tokenizer.decode(encoded.input_ids[first - 1]) == "<|assistant|>"


def test_slot_words_in_an_answer_are_text(encoder):
    encoded = encoder(turns(("human", "write a tag"), ("gpt", "<image>")))
    assert VISUAL_SLOT not in encoded.input_ids
    assert learnt(encoder, encoded) == "<image><|end|>"


def test_a_template_that_drops_answers_is_refused():
    encoder = ConversationEncoder()
    encoder.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="turn by turn"):
        encoder(turns(*TALK))
    encoder.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(BadSampleError, match="chat_template: no system turn"):
        encoder(turns(*TALK))


def test_the_prompt_is_the_questions_alone(encoder):
    tokenizer = encoder.prompt_tokenizer
    ids = encoder(turns(*TALK)).prompt_ids
    assert tokenizer.decode(ids) == "<|start|>What is it? and this?<|end|>"
    whole = ConversationEncoder(prompt_with_answers=True)(turns(*TALK)).prompt_ids
    assert tokenizer.decode(whole) == "<|start|>What is it? A bike 57. and this? no<|end|>"
    short = ConversationEncoder(max_prompt_length=6)(turns(*TALK)).prompt_ids
    assert len(short) == 6
    assert short[-1] == tokenizer.eos_token_id  # the position where CLIP reads the embedding


def test_answers_reach_the_guide_only_where_they_are_asked_to(compose, tmp_path):
    """By default, two conversations that differ only in their answers have the same prompt."""

    others = [(role, "another" if role == "gpt" else text) for role, text in TALK]
    for option, leaks in (([], False), (["data.conversation.prompt_with_answers=true"], True)):
        config = compose(["data=instruct", "llm=tiny", *option], tmp_path)
        encoder = instantiate(config.data.conversation)()
        guides = [encoder(turns(*talk)).prompt_ids for talk in (TALK, others)]
        assert (guides[0] != guides[1]) == leaks


def test_too_long(encoder):
    full = encoder(turns(*TALK))
    cut = ConversationEncoder(max_length=len(full.input_ids) - 2)(turns(*TALK))
    assert cut.input_ids == full.input_ids[:-2]
    assert cut.labels == full.labels[:-2]
    second_slot = len(full.input_ids) - full.input_ids[::-1].index(VISUAL_SLOT)
    for too_short in (second_slot - 1, 5):
        with pytest.raises(BadSampleError, match="too_long"):
            ConversationEncoder(max_length=too_short)(turns(*TALK))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({}, "missing_field"),
        ([], "missing_field"),
        ({"conversations": []}, "empty_conversation"),
        ({"conversations": "hello"}, "empty_conversation"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "empty_conversation"),
        ({"conversations": [{"from": "human"}]}, "missing_field"),
        ({"conversations": [{"from": "human", "value": None}]}, "missing_field"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "unknown_role"),
    ],
)
def test_entries_without_what_they_need(entry, reason):
    with pytest.raises(BadSampleError) as caught:
        read_turns(entry)
    assert caught.value.reason == reason


def test_slots_take_visuals_of_their_kind_in_order():
    talk = turns(("human", "<image> <video> <image>"), ("gpt", "x"))
    assert match_slots(talk, ["0.jpg", "1.jpg", "2.mp4"]) == ["0.jpg", "2.mp4", "1.jpg"]
    lone = turns(("human", "<image>\nwhat?"), ("gpt", "x"))
    assert match_slots(lone, ["mp4"]) == ["mp4"]  # LLaVA-Video writes <image> for videos
    video = turns(("human", "<video>\nwhat?"), ("gpt", "x"))
    for talk, names, reason in (
        (video, ["jpg"], "not_a_video"),
        (video, [], "slot_mismatch"),
        (video, ["0.mp4", "1.mp4"], "slot_mismatch"),
        (turns(("human", "<image><image>"), ("gpt", "x")), ["a.jpg", "b.mp4"], "slot_mismatch"),
    ):
        with pytest.raises(BadSampleError) as caught:
            match_slots(talk, names)
        assert caught.value.reason == reason


def test_parse_sample():
    text = '{"conversations": [{"from": "human", "value": "%s"}, {"from": "gpt", "value": "b"}]}'
    raw = {"__key__": "k", "json": (text % ("<image>" * 3)).encode()}
    raw |= {"10.jpg": b"", "2.jpg": b"", "1.png": b"", "txt": b""}
    assert parse_sample(raw)[1] == ["1.png", "2.jpg", "10.jpg"]
    for raw, reason in (
        ({"mp4": b""}, "missing_field"),
        ({"json": b"{"}, "bad_json"),
        ({"json": b"\xff"}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": (text % "<video>").encode()}, "slot_mismatch"),
    ):
        with pytest.raises(BadSampleError) as caught:
            parse_sample(raw)
        assert caught.value.reason == reason


# --- tokenizers ----------------------------------------------------------------------------------


def test_tiny_tokenizer_reads_everything_back():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= 2048
    text = "what is 1957? \n\t é 漢字 🙂 <image> \x00 x7y"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    for digit in "0123456789":
        for text in (digit, f" {digit}"):
            assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id


def test_tiny_tokenizer_is_the_same_in_every_process():
    code = "from datamodules.sample.tokenizer import tiny_tokenizer as t;" \
           "print(t().backend_tokenizer.to_str())"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == tiny_tokenizer().backend_tokenizer.to_str()


def test_tokenizers_from_a_folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    again = ConversationEncoder(str(tmp_path), str(tmp_path))
    assert again(turns(*TALK)) == ConversationEncoder()(turns(*TALK))


def test_a_tokenizer_without_template_or_padding_gets_them(tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template, bare.pad_token = None, None
    bare.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == "{{ bos_token }}" + DEFAULT_TEMPLATE
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_tokenizer_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    letters = [chr(n) for n in range(97, 123)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("ab", add_special_tokens=False).input_ids == [29]
    assert tokenizer.chat_template


@pytest.mark.parametrize("source", ["/nowhere/at/all", "/nowhere/x.gguf", "no such name!"])
def test_a_source_that_is_not_there_is_one_line(source):
    with pytest.raises(ValueError, match="no tokenizer can be loaded") as caught:
        load_tokenizer(source)
    assert "\n" not in str(caught.value)
