"""The loss of a step is the mean over all its terms, for any micro-batches and ranks."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from experiments.run.compose import build, plain
from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.preference.module import PreferenceModule
from lightning_modules.training.preference.reference import StreamedReference
from lightning_modules.training.step import StepLoss
from tests.helpers.uneven import (
    EIGHT,
    LABELS,
    LAYOUTS,
    Gradients,
    Layout,
    Samples,
    flat,
    loss_by_hand,
    make_pairs,
    make_rows,
    pair_by_hand,
)

BETA, GAMMA = 0.1, 0.7


class Seen(NamedTuple):
    """Records gradients by optimizer step. The callback itself keeps the module."""

    steps: list[dict[str, torch.Tensor]]
    logged: list[dict[str, float]]
    samples: int


class Pairs(PreferenceModule):
    """References that were made with the settings of this run."""

    def settings(self):
        return {}


@pytest.fixture(scope="module")
def fit(compose, tiny, tmp_path_factory):
    """`fit(layout, ...)` returns the gradients of the steps over the samples, and the module."""
    folder = tmp_path_factory.mktemp("fit")

    @cache
    def configured(*words):
        return compose(
            [*tiny, "pooler=prompt_guided_2x2", "trainer.gradient_clip_val=null", *words], folder
        )

    def run(layout, *words, val=8, pairs=None, optimizer=still, plugins=None, **options):
        config = configured(*words)
        torch.manual_seed(0)
        stage = VideoLLMModule
        if pairs:
            stage = Pairs
            loss = configured("module=preference", f"module/loss={pairs}").module.loss
            loss.beta = BETA
            options |= {"loss": build(loss, "loss"), "reference": StreamedReference()}
        tuning = build(config.tuning, "tuning")
        module = stage(plain(config.model), optimizer, tuning=tuning, **options)
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[seen := Gradients()],
            logger=False,
            enable_checkpointing=False,
            plugins=plugins,
            accumulate_grad_batches=layout.accumulation,
        )
        trainer.fit(module, datamodule=Samples(layout, make_pairs if pairs else make_rows, val))
        return Seen(seen.steps, seen.logged, module.step_loss.samples), module

    return run


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.fixture(scope="module")
def truth(fit):
    """Returns for each sample alone: gradients by name, the sum of its loss, its labels."""
    _, module = fit(LAYOUTS["1x8"])
    return [by_hand(module, loss_by_hand, make_rows([number])) for number in EIGHT]


@pytest.fixture(scope="module")
def truth_of_pairs(fit):
    """`truth_of_pairs(loss)` returns the same for each pair."""

    @cache
    def of(loss):
        _, module = fit(LAYOUTS["1x8"], pairs=loss)

        def hand(network, batch):
            return pair_by_hand(network, batch, loss, BETA, GAMMA), 1

        return [by_hand(module, hand, make_pairs([number])) for number in EIGHT]

    return of


def by_hand(module, hand, batch):
    module.zero_grad()
    loss, terms = hand(module.network, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return gradients, loss.item(), terms


def mean(parts, numbers):
    """Adds up losses and gradients of the samples, and divides by the number of their terms."""
    chosen = [parts[number] for number in numbers]
    terms = sum(count for _, _, count in chosen)
    gradient = sum(flat(gradients) for gradients, _, _ in chosen) / terms
    return gradient, sum(loss for _, loss, _ in chosen) / terms


def distance(found, expected):
    return ((flat(found) - expected).norm() / expected.norm()).item()


def lengths(numbers):
    """Returns tokens of each row: six of the question, the visual's pooled ones, the answer."""
    # 4 x 4 patches a frame, pooled 2 x 2; a slot is one of the six
    visual = [0 if n % 3 == 1 else 4 * (1 + n % 3) - 1 for n in numbers]
    return [6 + v + LABELS[n] for n, v in zip(numbers, visual, strict=True)]


def check(seen, layout, parts, tolerance=1e-5):
    expected = [mean(parts, [n for numbers in step for n in numbers]) for step in layout.steps]
    assert len(seen.steps) == len(expected) == len(seen.logged)
    for gradients, logged, (gradient, loss) in zip(seen.steps, seen.logged, expected, strict=True):
        assert distance(gradients, gradient) < tolerance
        assert logged["train/loss"] == pytest.approx(loss, rel=tolerance)
    assert seen.samples == sum(len(numbers) for step in layout.steps for numbers in step)


def check_tokens(seen, layout):
    for logged, step in zip(seen.logged, layout.steps, strict=True):
        assert logged["train/tokens"] == sum(sum(lengths(numbers)) for numbers in step)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_of_a_step_weighs_the_same(name, fit, truth):
    seen, _ = fit(LAYOUTS[name])
    check(seen, LAYOUTS[name], truth)


def test_packed_rows_of_a_budget_weigh_the_same(fit, truth):
    seen, _ = fit(LAYOUTS["budget"], packing=64)
    check(seen, LAYOUTS["budget"], truth)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("4x2", "sigmoid"), ("budget", "sigmoid"), ("short", "ipo"), ("budget", "hinge")],
)
def test_every_pair_of_a_step_weighs_the_same(name, loss, fit, truth_of_pairs):
    seen, _ = fit(LAYOUTS[name], pairs=loss, gamma=GAMMA)
    check(seen, LAYOUTS[name], truth_of_pairs(loss))


#: A step of two ranks, and one that is short on both.
SHORT = Layout([[[0], [1], [2], [3]], [[4, 5, 6], [7]]], 2)


@pytest.mark.parametrize(
    ("world", "words", "layout"),
    [
        (2, ("trainer=ddp_sim",), SHORT),
        (2, ("trainer=fsdp_sim",), SHORT),
        (2, ("trainer=fsdp_tp_sim", "pooler=average_2x2"), LAYOUTS["short"]),
        pytest.param(
            4, ("trainer=fsdp_tp_sim", "trainer.devices=4"), SHORT, marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            ("trainer=fsdp_sim", "tuning.checkpointing=[llm,encoder]"),
            SHORT,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ddp", "fsdp", "tensor_parallel", "fsdp_tensor_parallel", "recomputed"],
)
def test_ranks_take_the_step_of_all_their_terms(world, words, layout, fit, truth, run_ranks):
    if "pooler=average_2x2" in words:
        _, module = fit(LAYOUTS["1x8"], "pooler=average_2x2")
        truth = [by_hand(module, loss_by_hand, make_rows([number])) for number in EIGHT]
    for seen in run_ranks(world, lambda rank: fit(layout, *words)[0]):
        check(seen, layout, truth, 1e-4)
        check_tokens(seen, layout)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_ranks_take_the_step_of_all_their_pairs(trainer, fit, truth_of_pairs, run_ranks):
    found = run_ranks(
        2, lambda rank: fit(SHORT, f"trainer={trainer}", pairs="sigmoid", gamma=GAMMA)[0]
    )
    for seen in found:
        check(seen, SHORT, truth_of_pairs("sigmoid"), 1e-4)


def test_lora_and_bfloat16_take_the_same_step(fit):
    words = ["tuning=lora", "tuning.lora.rank=4", "tuning.lora.dropout=0.0"]
    words += ["tuning.groups.llm=null", "tuning.groups.projector=null"]  # with rates of their own
    _, module = fit(LAYOUTS["1x8"], *words)
    parts = [by_hand(module, loss_by_hand, make_rows([number])) for number in EIGHT]
    seen, _ = fit(LAYOUTS["budget"], *words)
    check(seen, LAYOUTS["budget"], parts)
    seen, _ = fit(LAYOUTS["budget"], *words, "trainer.precision=bf16-mixed")
    check(seen, LAYOUTS["budget"], parts, 0.05)


@pytest.mark.parametrize("name", ["8x1", "budget", "short"])
def test_the_published_mean_of_means_can_be_asked_for(name, fit, truth):
    layout = LAYOUTS[name]
    seen, _ = fit(layout, loss_mean="micro_batch")
    for gradients, logged, step in zip(seen.steps, seen.logged, layout.steps, strict=True):
        means = [mean(truth, numbers) for numbers in step]
        expected = sum(gradient for gradient, _ in means) / len(means)
        assert distance(gradients, expected) < 1e-5
        assert logged["train/loss"] == pytest.approx(sum(m for _, m in means) / len(means))
    whole, _ = mean(truth, [n for numbers in layout.steps[0] for n in numbers])
    assert distance(seen.steps[0], whole) > 0.05, "the two means must differ"


def test_another_mean_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"module.loss_mean is 'token'; set it to 'step' or 'mic"):
        StepLoss("token")


def test_float16_and_its_scaler_take_the_same_step(fit, truth):
    """Gradients are unscaled after they became those of the mean, and no step is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    half = MixedPrecision("16-mixed", "cpu", scaler)
    seen, _ = fit(LAYOUTS["8x1"], "trainer.precision=null", plugins=half)
    check(seen, LAYOUTS["8x1"], truth, 0.03)
    assert scaler.get_scale() == 16.0, "a step was skipped"


def test_a_step_without_any_label_has_no_gradient(fit, monkeypatch):
    monkeypatch.setattr("tests.helpers.uneven.LABELS", (0,) * 8)
    seen, _ = fit(LAYOUTS["4x2"])
    assert flat(seen.steps[0]).abs().max() == 0
    assert seen.logged[0]["train/loss"] == 0


def test_logs_are_of_the_whole_step(fit, run_ranks):
    """Tokens and padding are those of all micro-batches and ranks. There is one row per step."""
    layout, words = Layout([[[0, 3], [1], [2, 7], [4]]], 2), ["trainer=ddp_sim"]
    found = run_ranks(2, lambda rank: fit(layout, *words)[0].logged)
    alone = fit(Layout(layout.steps, 4))[0].logged
    assert len(alone) == 1
    for logged in (*found, alone):
        assert logged[0]["train/tokens"] == TOKENS
        assert logged[0]["train/padding"] == pytest.approx(1 - TOKENS / CELLS)


SHARES = [[0, 3], [1], [2, 7], [4]]
TOKENS = sum(sum(lengths(numbers)) for numbers in SHARES)
CELLS = sum(len(numbers) * max(lengths(numbers)) for numbers in SHARES)


def adam(parameters):
    """The eps is large: AdamW would turn rounding errors of zero gradients into steps."""
    return torch.optim.AdamW(parameters, lr=0.02, eps=3e-2)


@pytest.mark.parametrize(("mean", "same"), [("step", True), ("micro_batch", False)])
def test_what_is_learnt_does_not_depend_on_the_batch_size(mean, same, fit):
    """Four steps of the eight samples. The mean of means learns something else."""
    ends = []
    for name in ("1x8", "4x2", "8x1"):
        layout = LAYOUTS[name]
        long = Layout(layout.steps * 4, layout.accumulation)
        seen, module = fit(long, optimizer=adam, loss_mean=mean)
        assert seen.logged[-1]["train/loss"] < 0.95 * seen.logged[0]["train/loss"]
        ends.append(module.trainer.callback_metrics["val/loss"].item())
    assert (max(ends) - min(ends) < 1e-3) == same


@pytest.mark.parametrize("val", [1, 3, 8])
def test_val_loss_is_the_mean_over_labels_for_every_batch_size(val, fit, truth):
    _, module = fit(LAYOUTS["1x8"], val=val)
    found = module.trainer.callback_metrics["val/loss"].item()
    assert found == pytest.approx(mean(truth, EIGHT)[1], rel=1e-5)


def test_val_loss_counts_a_sample_once_that_two_ranks_have_read(fit, truth, run_ranks):
    """Three batches of three on two ranks: the first is read again."""

    def run(rank):
        _, module = fit(SHORT, "trainer=ddp_sim", val=3)
        return module.trainer.callback_metrics["val/loss"].item()

    assert run_ranks(2, run) == pytest.approx([mean(truth, EIGHT)[1]] * 2, rel=1e-5)


def test_validation_of_pairs_counts_a_pair_once(fit, truth_of_pairs, run_ranks):
    def run(rank):
        _, module = fit(SHORT, "trainer=ddp_sim", val=3, pairs="sigmoid", gamma=GAMMA)
        metrics = module.trainer.callback_metrics
        return [metrics[f"val/{name}"].item() for name in ("loss", "reward_accuracy")]

    expected = mean(truth_of_pairs("sigmoid"), EIGHT)[1]
    for loss, accuracy in run_ranks(2, run):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert 8 * accuracy == pytest.approx(round(8 * accuracy))


def test_sums_are_divided_by_a_power_of_two_that_changes_no_digit():
    """float16 would overflow at the gradients of a sum over thousands of tokens."""
    step = StepLoss()
    weight = torch.nn.Parameter(torch.tensor([0.3]))
    first = step.add((weight * 3000.0).sum(), torch.tensor(3000), 1)
    first.backward()
    assert step.state_dict() == {"samples": 0, "unit": 2048.0}
    assert weight.grad.item() == 3000 / 2048
    step.add((weight * 5.0).sum(), 5, 1).backward()
    sums = step.finish([weight], 1)
    assert weight.grad.item() == pytest.approx(1.0)
    assert (sums["terms"], sums["samples"], step.samples) == (3005, 2, 2)
    again = StepLoss()
    again.load_state_dict(step.state_dict())
    assert again.state_dict() == {"samples": 2, "unit": 2048.0}
