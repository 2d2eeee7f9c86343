"""Losses and gradients equal TRL's, log-probabilities equal the model's own."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from datamodules.batch import IGNORE_INDEX
from experiments import CONFIG_DIR
from lightning_modules.loss import sequence_log_probs
from lightning_modules.model import LogProbs
from lightning_modules.training.preference.loss import HingeLoss, IPOLoss, SigmoidLoss
from lightning_modules.training.preference.module import PreferenceModule
from lightning_modules.training.preference.reference import StreamedReference
from tests.helpers.pairs import OPTIONS, read_pairs, stage_maker, words_of, write_pairs

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dpo" / "trl.json").read_text())
LOSSES = {"sigmoid": SigmoidLoss, "ipo": IPOLoss, "hinge": HingeLoss}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return words_of(write_pairs(tmp_path_factory.mktemp("pairs")))


@pytest.fixture(scope="module")
def make_stage(words, compose, tmp_path_factory):
    return stage_maker(words, compose, tmp_path_factory)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['trl']}-{c['loss']}")
def test_losses_and_gradients_are_those_of_trl(case):
    options = {"label_smoothing": case["label_smoothing"]} if case["loss"] == "sigmoid" else {}
    loss = LOSSES[case["loss"]](case["beta"], **options)
    module = PreferenceModule({}, list, loss=loss, reference=StreamedReference())
    policy = torch.tensor(GOLDEN["policy"], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(GOLDEN["reference"], dtype=torch.float64)
    values = module.judge(
        LogProbs(policy, torch.tensor(GOLDEN["counts"]), torch.tensor(0)), reference
    )
    mean = values["loss"].mean()
    mean.backward()
    assert mean.item() == pytest.approx(case["mean_loss"], rel=1e-12)
    if "losses" in case:
        assert values["loss"].tolist() == pytest.approx(case["losses"], rel=1e-12)
    expected = torch.tensor(case["gradients"], dtype=torch.float64)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-10, atol=1e-14)
    names = {
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
        "logps/chosen": "logp_chosen",
        "logps/rejected": "logp_rejected",
    }
    for name, value in case.get("metrics", {}).items():
        rel = 1e-6 if "accuracies" in name else 1e-12  # that one is float32
        assert values[names[name]].mean().item() == pytest.approx(value, rel=rel), name


def test_the_golden_numbers_cover_losses_betas_and_smoothing():
    cases = {(c["loss"], c["beta"], c["label_smoothing"]) for c in GOLDEN["cases"]}
    assert {loss for loss, _, _ in cases} == set(LOSSES) == set(OPTIONS["loss"])
    assert len({beta for _, beta, _ in cases}) == 3
    assert {smoothing for loss, _, smoothing in cases if loss == "sigmoid"} == {0.0, 0.1, 0.3}


@pytest.mark.parametrize("loss", [SigmoidLoss(0.3, 0.2), IPOLoss(0.3), HingeLoss(0.3)])
def test_gradients_are_finite_differences(loss):
    rng = torch.Generator().manual_seed(0)
    four = [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(4)]
    assert torch.autograd.gradcheck(loss, [values.requires_grad_() for values in four])


def test_a_likelihood_term_is_the_mean_over_answers_of_means_over_tokens():
    sums = torch.tensor([[-6.0, -4.0], [-2.0, -9.0]])
    policy = LogProbs(sums, torch.tensor([[3, 2], [4, 3]]), torch.tensor(0))
    made = {"loss": SigmoidLoss(), "reference": StreamedReference()}
    plain_loss, with_term, only_term = (
        PreferenceModule({}, list, **made, **weights).judge(policy, sums - 1)["loss"].mean()
        for weights in ({}, {"gamma": 0.5}, {"gamma": 2.0, "dpo_alpha": 0.0})
    )
    assert (with_term - plain_loss).item() == pytest.approx(0.5 * (2.0 + 0.5) / 2)
    assert only_term.item() == pytest.approx(2.0 * (2.0 + 0.5) / 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: HingeLoss(0.0), r"module\.loss\.beta is 0\.0; set it above 0"),
        (
            lambda: SigmoidLoss(0.1, 0.5),
            r"label_smoothing is 0\.5; set it to 0 or more, below 0\.5",
        ),
    ],
)
def test_what_a_loss_does_not_take_is_said_in_one_line(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# Log-probabilities


def test_sequence_log_probs_are_those_of_all_logits():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, 4, generator=rng, requires_grad=True)
    weight = torch.randn(11, 4, generator=rng)
    labels = torch.randint(0, 11, (3, 7), generator=rng)
    labels[0, :4] = labels[1, 5:] = labels[2] = IGNORE_INDEX  # the last row has none
    asked = []

    def head(states):
        asked.append(len(states))
        return states @ weight.T

    sums, counts = sequence_log_probs(hidden, labels, head)
    everywhere = log_softmax(hidden[:, :-1] @ weight.T, dim=-1)
    for row in range(3):
        learnt = [n for n in range(1, 7) if labels[row, n] != IGNORE_INDEX]
        expected = sum(everywhere[row, n - 1, labels[row, n]] for n in learnt)
        assert counts[row] == len(learnt)
        torch.testing.assert_close(sums[row], torch.as_tensor(expected, dtype=torch.float32))
    assert asked == [counts.sum()]
    sums.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[2].abs().max() == 0
    assert sequence_log_probs(hidden.bfloat16(), labels, lambda h: h @ weight.bfloat16().T)[
        0
    ].dtype == (torch.float32)


@pytest.mark.parametrize("rotary", sorted(p.stem for p in (CONFIG_DIR / "rotary").glob("*.yaml")))
def test_a_pair_in_a_batch_is_each_answer_alone(rotary, make_stage):
    """For any padding. The visuals are encoded once."""
    sections = ["model.llm.config.head_dim=32"]
    module, data = make_stage(f"rotary={rotary}", *[f"+{word}" for word in sections])
    pairs = read_pairs(data, 3)
    network = module.network.eval()
    encoded = []
    network.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    with torch.no_grad():
        together = network.log_probs(data.collater()(pairs))
        assert encoded == [3]
        for row, pair in enumerate(pairs):
            batch = data.collater()([pair])
            for column, answer in enumerate((batch.chosen, batch.rejected)):
                output = network(answer)
                alone = -output.loss * output.labelled
                assert together.counts[row, column] == output.labelled
                torch.testing.assert_close(together.sums[row, column], alone, rtol=1e-4, atol=1e-4)


def test_a_scheme_that_draws_needs_a_reference_that_draws_too(make_stage):
    """The numbers in the shards were made without draws: the margin at the start would not be 0."""
    module, data = make_stage("rotary=hope", "+model.llm.config.head_dim=32")
    batch = data.collater()(read_pairs(data, 1))
    with pytest.raises(ValueError, match=r"HopeRope draws its settings .*module/reference=frozen"):
        StreamedReference().log_probs(module.network, batch, dict)
