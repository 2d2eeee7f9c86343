"""Ranks compare their rows with those of all ranks, as a single process does."""

from functools import partial

import pytest
import torch
from lightning import Callback

from datamodules.base import VideoDataModule
from experiments.run.compose import build, plain
from lightning_modules.training.contrast import ClipContextModule
from tests.helpers.tiny_clip import SMALL, make_batch
from tests.helpers.tiny_fit import whole

STEPS, ROWS = 20, 8  # rows of a global batch


class Share:
    """Batches of these rows, made anew for each epoch."""

    def __init__(self, parts):
        self._parts = parts

    def __len__(self):
        return len(self._parts)

    def __iter__(self):
        for numbers in self._parts:
            yield make_batch(numbers, length=90, vocabulary=2000, size=32)


class Batches(VideoDataModule):
    """Rank r has its share of the rows of each step, in the order of the ranks."""

    def __init__(self, rows):
        super().__init__(rows)
        self.global_batch_size = ROWS

    @property
    def tokenizer(self):
        raise AssertionError("nothing is written as text")

    def train_dataloader(self):
        world, rank, rows = self.trainer.world_size, self.trainer.global_rank, self.batch_size
        assert world * rows == ROWS
        starts = [step * ROWS + rank * rows for step in range(STEPS)]
        return Share([range(start, start + rows) for start in starts])

    def val_dataloader(self):
        """Over 15 rows. A rank with one batch less repeats its first batch."""
        parts = [range(900, 906), range(906, 912), range(912, 915), range(900, 906)]
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return Share(parts[rank::2] if world > 1 else parts[:3])


class Uneven(Batches):
    even = False


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.callback_metrics["train/loss"].item())


@pytest.fixture(scope="module")
def fit(compose):
    def run(folder, world, *overrides):
        config = compose([*SMALL, *overrides, f"trainer.devices={world}"], folder)
        torch.manual_seed(0)
        optimizer = build(config.optim.optimizer, "optim")
        module = ClipContextModule(plain(config.model), optimizer, temperature=0.07)
        losses = Losses()
        options = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[losses],
            logger=False,
            enable_checkpointing=False,
            max_epochs=1,
            **options,
        )
        trainer.fit(module, datamodule=Batches(ROWS // world))
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        return losses.seen, metrics, whole(module)

    return run


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("alone"), 1)


def contrast_by_hand(network, numbers):
    """Computes InfoNCE in both directions: each row's own similarity against all of the step."""
    pairs = network(make_batch(numbers, length=90, vocabulary=2000, size=32))
    table = pairs.scale * pairs.visuals @ pairs.captions.T
    own = table.diagonal()
    return ((table.logsumexp(0) - own) / 2 + (table.logsumexp(1) - own) / 2).mean()


class Step(Callback):
    """Records gradients and loss of one step."""

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients = {
            n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for n, p in pl_module.named_parameters()
            if p.grad is not None
        }

    def on_train_batch_end(self, trainer, *_):
        self.loss = trainer.callback_metrics["train/loss"].item()


def check_step(found, loss, network, numbers):
    gradients = found
    network.zero_grad()
    expected = contrast_by_hand(network, numbers)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    hand = {f"model.{n}": p.grad for n, p in network.named_parameters() if p.grad is not None}
    assert gradients.keys() == hand.keys()
    torch.testing.assert_close(gradients, hand, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("trainer", "rows"), [("alone", 8), ("alone", 5), ("ddp_sim", 8), ("fsdp_sim", 8)]
)
def test_a_step_is_the_mean_over_its_captions(trainer, rows, fit_step, run_ranks):
    """Also for a short step."""
    world = 1 if trainer == "alone" else 2
    numbers = range(rows)
    words = [] if world == 1 else [f"trainer={trainer}"]

    def run(rank):
        step, network = fit_step(numbers, world, *words)
        return step.gradients, step.loss, whole(network)

    results = [run(0)] if world == 1 else run_ranks(world, run)
    _, network = fit_step(numbers, 1)
    for gradients, loss, weights in results:
        torch.testing.assert_close(weights, whole(network), rtol=0, atol=0)
        check_step(gradients, loss, network, numbers)


@pytest.mark.parametrize(("ranks", "even"), [(1, False), (2, True), (2, False)])
def test_ranks_with_batches_of_different_sizes_are_refused(ranks, even, compose, tmp_path):
    config = compose(SMALL, tmp_path)
    module = ClipContextModule(plain(config.model), partial(torch.optim.SGD, lr=0.0))
    data = Uneven(ROWS) if not even else Batches(ROWS)
    if ranks == 1 or even:
        module.check_sharing(data, ranks, 1)
        return
    with pytest.raises(ValueError, match=r"2 ranks needs .* set data.stream.max_tokens=null"):
        module.check_sharing(data, ranks, 1)


@pytest.fixture(scope="module")
def fit_step(compose, tmp_path_factory):
    """`fit_step(numbers, world, *overrides)` takes one step over these rows, shared by ranks."""
    folder = tmp_path_factory.mktemp("step")

    class Rows(Batches):
        def __init__(self, numbers):
            super().__init__(len(numbers))
            self.numbers = numbers

        def train_dataloader(self):
            own = len(self.numbers) // self.trainer.world_size
            start = own * self.trainer.global_rank
            return Share([self.numbers[start : start + own]])

    def run(numbers, world, *overrides):
        config = compose([*SMALL, *overrides, f"trainer.devices={world}"], folder)
        torch.manual_seed(0)
        still = partial(torch.optim.SGD, lr=0.0)
        module = ClipContextModule(plain(config.model), still, temperature=0.07)
        options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        options |= {"enable_checkpointing": False, "gradient_clip_val": None, "max_steps": 1}
        step = Step()
        trainer = build(config.trainer, "trainer", callbacks=[step], **options)
        trainer.fit(module, datamodule=Rows(numbers))
        return step, module.network

    return run


@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_two_ranks_contrast_what_one_process_contrasts(trainer, fit, alone, run_ranks, tmp_path):
    losses, metrics, weights = alone
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for seen, found, after in run_ranks(2, lambda rank: fit(tmp_path, 2, f"trainer={trainer}")):
        torch.testing.assert_close(seen, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)
        assert found == pytest.approx(metrics, abs=1e-4)
    assert metrics.keys() >= {"val/loss", "val/t2i_r1", "val/i2t_r10"}
