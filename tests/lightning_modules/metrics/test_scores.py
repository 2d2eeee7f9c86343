"""Scores of validation: equal for any batch and number of ranks, stored with all their inputs."""

import json
import math
from functools import partial

import pytest
import torch
from torchmetrics.text import Perplexity as ReferencePerplexity

from datamodules.batch import VISUAL_SLOT, Task
from datamodules.errors import BadSampleError
from datamodules.instruct import collate, decode_sample
from datamodules.sample.conversation import ConversationEncoder, Turn
from datamodules.sample.question import encode_task, read_task
from datamodules.visuals.frames import FrameReader, UniformSampler
from lightning_modules.metrics.answers.generate import read_answers
from lightning_modules.metrics.base import Answered
from lightning_modules.metrics.multiple_choice import GeneratedLetter, LikeliestLetter
from lightning_modules.metrics.open_answer import OpenAnswer
from lightning_modules.metrics.perplexity import Perplexity
from lightning_modules.metrics.yes_no_pairs import YesNoPairs
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from tests.helpers.questions import make_question

SCHEMES = ["vanilla", "tad", "mrope", "videorope"]


def all_scores():
    return [Perplexity(), LikeliestLetter(), GeneratedLetter(6), YesNoPairs(6), OpenAnswer(6)]


@pytest.fixture(scope="module")
def conversation():
    return ConversationEncoder()


@pytest.fixture(scope="module")
def questions(conversation):
    """Eight samples of very different lengths, of every kind in turn. The third is only text."""
    read = FrameReader(32, UniformSampler(4))
    samples = []
    for seed in range(8):
        raw = {"__key__": f"k{seed}", "__url__": "s.tar", **make_question(seed)}
        entry = json.loads(raw["json"])
        first = entry["conversations"][0]
        first["value"] += " please" * (7 * seed % 40)
        if seed == 2:
            del raw["mp4"]
            first["value"] = first["value"].replace("<video>\n", "")
        samples.append(
            decode_sample({**raw, "json": json.dumps(entry).encode()}, read, conversation)
        )
    return samples


@pytest.fixture(scope="module")
def network(compose, tiny, tmp_path_factory):
    """`network(rotary)` has random weights that are large enough for its answers to differ."""
    folder = tmp_path_factory.mktemp("network")

    def make(rotary):
        words = [*tiny, f"rotary={rotary}", "pooler=prompt_guided_2x2"]
        config = compose([*words, "model.llm.config.initializer_range=0.3"], folder)
        torch.manual_seed(3)
        from experiments.run.compose import plain

        return VideoLanguageModel(VideoLanguageModelConfig(**plain(config.model))).eval()

    return make


def batches(samples, size, conversation):
    pad = conversation.tokenizer.pad_token_id
    put = partial(collate, pad_id=pad, prompt_pad_id=pad)
    return [put(samples[at : at + size]) for at in range(0, len(samples), size)]


def answers(network, batches, conversation, scores=None):
    tokenizer = lambda: conversation.tokenizer  # noqa: E731
    found = []
    with torch.no_grad():
        for batch in batches:
            given = all_scores() if scores is None else scores
            found += read_answers(network, batch, network(batch), given, tokenizer)
    return found


@pytest.mark.parametrize("rotary", SCHEMES)
def test_the_batch_size_changes_nothing(rotary, network, questions, conversation):
    """Padding is on the right for likelihoods, and on the left for generated answers."""
    model = network(rotary)
    by_size = {
        size: answers(model, batches(questions, size, conversation), conversation)
        for size in (1, 2, 5)
    }
    alone = by_size[1]
    said = [answer.said(6) for answer in alone]
    assert len(set(said)) > 3, "a model that always says the same proves nothing"
    for found in by_size.values():
        assert [answer.said(6) for answer in found] == said
        for one, other in zip(alone, found, strict=True):
            assert other.key == one.key
            assert other.log_prob == pytest.approx(one.log_prob, abs=1e-3)
            assert other.options == pytest.approx(one.options, abs=1e-4)
    results = [values(found) for found in by_size.values()]
    for name, (value, count) in results[0].items():
        for result in results[1:]:
            same = value if name != "perplexity" else pytest.approx(value, rel=1e-4)
            assert (result[name].value == same, result[name].count) == (True, count), name


def values(answered, scores=None):
    found = {}
    for score in scores or all_scores():
        score.update(answered)
        found |= score.compute()
    return found


def test_options_are_as_likely_as_after_the_prompt_alone(network, questions, conversation):
    """One forward over prompt and answer gives the same as one over only the prompt."""
    model = network("videorope")
    (batch,) = batches(questions[:1], 1, conversation)
    (answered,) = answers(model, [batch], conversation, [LikeliestLetter()])
    asked = batch.questions()
    with torch.no_grad():
        output = model(asked)
        length = int(output.inputs.mask.sum())
        last = model.llm.head(output.hidden[0, length - 1]).log_softmax(-1)
    letters = conversation.tokenizer.convert_tokens_to_ids(["A", "B", "C", "D"])
    assert answered.options == pytest.approx(last[letters].tolist(), abs=1e-5)


def test_only_rows_of_which_text_is_wanted_are_generated(network, questions, conversation):
    model = network("vanilla")
    asked = []
    generate = model.generate
    model.generate = lambda batch, **options: asked.append(batch.keys) or generate(batch, **options)
    (batch,) = batches(questions[:4], 4, conversation)
    found = answers(model, [batch], conversation, [YesNoPairs(4), Perplexity()])
    assert asked == [["s.tar/k1", "s.tar/k2"]]
    assert found[0].said(4) == ""
    answers(model, [batch], conversation, [Perplexity(), LikeliestLetter()])
    assert len(asked) == 1


def test_a_score_reads_no_further_than_it_asked_for(network, questions, conversation):
    """So a score does not depend on the other scores that are chosen."""
    model = network("vanilla")
    (batch,) = batches(questions[:1], 1, conversation)
    (short,) = answers(model, [batch], conversation, [GeneratedLetter(3)])
    (long,) = answers(model, [batch], conversation, [GeneratedLetter(3), GeneratedLetter(16)])
    assert long.said(3) == short.said(3)
    assert len(long.said(16)) > len(long.said(3))


def test_perplexity_is_that_of_torchmetrics(network, questions, conversation):
    model = network("mrope")
    reference = ReferencePerplexity(ignore_index=-100)
    with torch.no_grad():
        for batch in batches(questions, 4, conversation):
            output = model(batch)
            reference.update(model.llm.head(output.hidden)[:, :-1], output.inputs.labels[:, 1:])
    found = values(
        answers(model, batches(questions, 3, conversation), conversation, [Perplexity()])
    )
    assert found["perplexity"].value == pytest.approx(reference.compute().item(), rel=1e-4)
    assert found["perplexity"].count == 8


def pair(name, basic, halluc):
    """Returns the model's two answers to a pair."""
    return [
        Answered(f"{name}-b", Task(("yes",), pair=name), 0.0, 1, said=lambda n: basic),
        Answered(
            f"{name}-h", Task(("no",), pair=name, hallucinated=True), 0.0, 1, said=lambda n: halluc
        ),
    ]


def test_pairs_by_hand():
    answered = [
        *pair("both", "Yes.", "no"),
        *pair("always yes", "yes", "Yes, it is."),
        *pair("always no", "no", "no"),
        *pair("neither", "maybe", "a bike"),
    ]
    score = YesNoPairs()
    score.update(answered[::2])  # the halves of a pair come in different batches
    score.update(answered[1::2])
    found = {name: value for name, (value, _) in score.compute().items()}
    assert found == {
        "pair_basic": 0.5,
        "pair_hallucinated": 0.5,
        "pair_overall": 0.25,
        "pair_yes_bias": (3 - 4) / 8,
        "pair_false_yes": 0.25,  # answers "always yes", "no", "maybe" and "a bike", which are wrong
        "pair_unparsed": 0.25,
    }
    counts = {name: count for name, (_, count) in score.compute().items()}
    assert [counts[name] for name in ("pair_basic", "pair_overall", "pair_false_yes")] == [4, 4, 4]


def test_half_a_pair_is_no_pair():
    found = values(pair("a", "yes", "no")[:1], [YesNoPairs()])
    assert found["pair_basic"] == (1.0, 1)
    assert "pair_overall" not in found
    assert "pair_hallucinated" not in found
    assert "pair_false_yes" not in found, "no answer is wrong, so there is no share"


@pytest.mark.parametrize(
    ("said", "exact", "f1"),
    [
        ("A red bike.", 1.0, 1.0),
        ("a bike", 0.0, 2 / 3),
        ("motorcycle", 1.0, 1.0),
        ("car", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_open_answers_by_the_nearest_right_one(said, exact, f1):
    answered = Answered("k", Task(("the red bike", "motorcycle")), 0.0, 1, said=lambda n: said)
    found = values([answered], [OpenAnswer()])
    assert found["open_exact"].value == exact
    assert found["open_f1"].value == pytest.approx(f1)


def test_what_names_no_letter_is_wrong_and_counted():
    task = Task(("B",), ("red", "blue"), (1, 2))
    said = ["B", "it is blue", "A"]
    found = [Answered(str(n), task, 0.0, 1, said=lambda n, t=t: t) for n, t in enumerate(said)]
    assert values(found, [GeneratedLetter()]) == {
        "mc_generated": (pytest.approx(1 / 3), 3),
        "mc_unparsed": (pytest.approx(1 / 3), 3),
    }


def test_a_sample_that_comes_twice_counts_once():
    task = Task(("A",), ("red", "blue"), (1, 2))
    right = Answered("right", task, -1.0, 1, (0.0, -1.0))
    wrong = Answered("wrong", task, -3.0, 1, (-1.0, 0.0))
    score, perplexity = LikeliestLetter(), Perplexity()
    for batch in ([right, wrong], [right], [right]):
        score.update(batch)
        perplexity.update(batch)
    assert score.compute()["mc_likelihood"] == (0.5, 2)
    assert perplexity.compute()["perplexity"].value == pytest.approx(math.exp(2))


def test_rows_are_kept_exactly_under_bf16():
    """trainer.precision=bf16-true makes bfloat16 torch's default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = values([Answered("k", None, -1000.5, 1001)], [Perplexity()])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["perplexity"].value == pytest.approx(math.exp(1000.5 / 1001), rel=1e-9)


def test_a_blind_row_is_its_text_alone(network, questions, conversation):
    """Rows of different lengths, one of them without a visual, give the logits of text rows."""
    model = network("videorope")
    (batch,) = batches(questions[:4], 4, conversation)
    blind = batch.without_visuals()
    assert len(batch.shapes) == 3
    assert not blind.shapes
    assert not blind.pixels.numel()
    with torch.no_grad():
        together = model(blind)
        for row, sample in enumerate(questions[:4]):
            kept = [n for n, token in enumerate(sample.text.input_ids) if token != VISUAL_SLOT]
            for name in ("input_ids", "labels"):
                whole = getattr(sample.text, name)
                part = getattr(blind, name)[row][blind.attention_mask[row]]
                assert part.tolist() == [whole[n] for n in kept]
            alone = model(batch.select([row]).without_visuals())
            hidden = together.hidden[row][: len(kept)]
            torch.testing.assert_close(hidden, alone.hidden[0], rtol=1e-4, atol=1e-4)


def test_ranks_reckon_what_one_reckons(run_ranks):
    """Samples of a pair are on different ranks. One rank has none of a kind, some are on both."""
    choice = Task(("A",), ("red", "blue"), (1, 2))
    likely = [(n % 3.0, 1.0) for n in range(5)]
    choices = [Answered(f"c{n}", choice, -n / 7, 2, likely[n], lambda c: "A") for n in range(5)]
    pairs = pair("one", "yes", "no") + pair("two", "yes", "yes")
    shares = [[choices[:2], pairs[::2]], [choices[2:] + choices[:1], pairs[1::2]]]
    shares[0][1] += choices[1:2]

    def reckon(rank):
        torch.distributed.init_process_group("gloo")
        found = {}
        for score in all_scores():
            for batch in shares[rank]:
                score.update(batch)
            found |= score.compute()
        torch.distributed.destroy_process_group()
        return found

    alone = values(choices + pairs)
    assert "open_exact" not in alone, "a score that no rank has a sample for"
    for found in run_ranks(2, reckon):
        assert found == alone


def read(question, talk=(("user", "what?"), ("assistant", "B"))):
    return read_task({"question": question}, [Turn(*turn) for turn in talk])


def test_what_a_sample_says_of_itself():
    assert read({"options": ["red", "blue"], "answer": "B"}) == Task(("B",), ("red", "blue"))
    assert read({"answer": ["a bike", "bicycle"]}) == Task(("a bike", "bicycle"))
    assert read({"answer": "no", "pair": "p", "hallucinated": True}) == Task(
        ("no",), pair="p", hallucinated=True, group="p"
    )
    facts = {"answer": "a bike", "category": "object", "group": "films"}
    assert read(facts) == Task(("a bike",), category="object", group="films")
    talk = [Turn("user", "what?"), Turn("assistant", "B")]
    for names, group in (({"video": "a.mp4"}, "a.mp4"), ({"video": ["a.mp4", "b.mp4"]}, "")):
        task = read_task({"question": {"answer": "B"}, **names}, talk)
        assert task is not None
        assert task.group == group, "questions about one video depend on one another"
    assert read("What is it?") is None, "a field of that name in someone's annotations"
    assert read_task({}, []) is None


@pytest.mark.parametrize(
    ("question", "detail"),
    [
        ({}, "answer must be a text"),
        ({"answer": 3}, "answer must be a text"),
        ({"answer": []}, "answer must be a text"),
        ({"answer": "C", "options": ["red", "blue"]}, r"\['C'\] is not a letter from A to B"),
        ({"answer": "", "options": ["red", "blue"]}, "answer must be a text"),
        ({"answer": "A", "options": ["red"]}, "1 options, but 2 to 26"),
        ({"answer": "A", "options": "red"}, "1 options"),
        ({"answer": "A", "options": ["x"] * 27}, "27 options"),
        ({"answer": "yes", "pair": "p"}, "must be given together"),
        ({"answer": "yes", "hallucinated": True}, "must be given together"),
        ({"answer": "maybe", "pair": "p", "hallucinated": True}, "yes or no"),
        ({"answer": "yes", "pair": 3, "hallucinated": True}, "pair must be a text"),
        ({"answer": "a bike", "category": ["x"]}, "category must be a text"),
        ({"answer": "a bike", "group": 7}, "group must be a text"),
        ({"answer": "yes", "pair": "p", "hallucinated": "no"}, "hallucinated must be true or"),
        ({"answer": "A", "options": ["a", "b"], "pair": "p", "hallucinated": True}, "not both"),
        ({"answer": "B", "choices": ["red", "blue"]}, "unknown field 'choices'"),
    ],
)
def test_a_question_that_is_wrong_is_a_bad_sample(question, detail):
    with pytest.raises(BadSampleError, match=detail) as caught:
        read(question)
    assert caught.value.reason == "bad_question"


def test_a_question_in_a_conversation_of_several_answers_is_refused():
    talk = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    with pytest.raises(BadSampleError, match="2 answers"):
        read({"answer": "b"}, talk)


def test_option_letters_are_the_tokens_that_a_template_writes(conversation):
    task = encode_task(Task(("B",), ("red", "blue")), conversation)
    words = conversation.tokenizer.convert_ids_to_tokens(task.option_ids)
    assert words == ["A", "B"]
    spaced = ConversationEncoder()
    spaced.tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        " {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    written = spaced.tokenizer.convert_ids_to_tokens(encode_task(task, spaced).option_ids)
    labels = spaced([Turn("user", "what?"), Turn("assistant", "B")]).labels
    first = next(label for label in labels if label >= 0)
    assert written[1] == spaced.tokenizer.convert_ids_to_tokens(first)


def test_letters_that_begin_alike_are_an_error(conversation, monkeypatch):
    monkeypatch.setattr(conversation, "first_token", lambda letter: 7)
    with pytest.raises(ValueError, match=r"A and B with the same token 7.*data\.conversation"):
        encode_task(Task(("B",), ("red", "blue")), conversation)


def test_the_answer_does_not_guide_the_pooler():
    """Not even where training allows it."""
    leaky = ConversationEncoder(prompt_with_answers=True)
    raw = {"__key__": "k", "__url__": "s", **make_question(0)}
    read_frames = FrameReader(32, UniformSampler(1))
    asked = decode_sample(raw, read_frames, leaky)
    assert (
        asked.text.prompt_ids
        == decode_sample(raw, read_frames, ConversationEncoder()).text.prompt_ids
    )
    entry = json.loads(raw["json"])
    del entry["question"]
    untold = decode_sample({**raw, "json": json.dumps(entry).encode()}, read_frames, leaky)
    assert len(untold.text.prompt_ids) > len(asked.text.prompt_ids)


def test_rows_keep_their_tasks_and_visuals(questions, conversation):
    (batch,) = batches(questions[:5], 5, conversation)
    for n, visual in enumerate(batch.visuals):
        visual.frames.fill_(n)  # the visuals of rows 0, 1, 3 and 4
    chosen = batch.select([4, 1, 2])
    assert chosen.keys == ["s.tar/k1", "s.tar/k2", "s.tar/k4"]
    assert [task.pair for task in chosen.tasks] == ["clip 0", "clip 0", ""]
    assert [int(visual.frames[0, 0, 0, 0]) for visual in chosen.visuals] == [1, 3]
    assert torch.equal(chosen.labels, batch.labels[[1, 2, 4]])
    assert batch.first(2).tasks == batch.tasks[:2]
    assert batch.questions().tasks == batch.tasks
    assert int((chosen.input_ids == VISUAL_SLOT).sum()) == 2
    with pytest.raises(ValueError, match="1 tasks for 5 rows"):
        type(batch)(**{**vars(batch), "tasks": batch.tasks[:1]})
