"""DDP and FSDP2 on CPU ranks take the same steps as a single process."""

import json

import pytest
import torch
from lightning import Callback

from lightning_modules.callbacks.guard import NonFiniteGuard
from lightning_modules.checkpoint.weights import sha256
from tests.helpers.finite import all_finite
from tests.helpers.tiny_fit import (
    OPTIM,
    STEPS,
    TUNED,
    Angles,
    Norms,
    make_fit,
    make_tiled_batch,
    whole,
)


@pytest.fixture(scope="module")
def fit(compose, tiny):
    return make_fit(compose, tiny)


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory):
    """Returns losses, weights and samples by step of a single process."""
    folder = tmp_path_factory.mktemp("alone")
    _, module, losses = fit(folder, 1, *OPTIM)
    return losses, whole(module), (folder / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone_tuned(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    norms = Norms()
    _, module, losses = fit(folder, 1, *TUNED, callbacks=[norms])
    assert min(norms.seen) > 0.3, "each step must be clipped"
    return losses, whole(module)


def check_losses(results, losses):
    """Every rank knows the loss of each step, which equals that of a single process."""
    assert len(losses) == STEPS
    for found in results:
        torch.testing.assert_close(found[0], losses, rtol=1e-4, atol=1e-5)
    assert sum(losses[:2]) > 1.1 * sum(losses[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_tuned_in_part_two_ranks_learn_what_one_process_learns(
    trainer, fit, alone_tuned, run_ranks, tmp_path
):
    def run(rank):
        _, module, losses = fit(tmp_path, 2, *TUNED, f"trainer={trainer}")
        return losses, whole(module), sha256(module)

    results = run_ranks(2, run)
    losses, weights = alone_tuned
    check_losses(results, losses)
    for _, after, _ in results:
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-5)
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_two_ranks_learn_what_one_process_learns(trainer, fit, alone, run_ranks, tmp_path):
    def run(rank):
        _, module, losses = fit(tmp_path, 2, *OPTIM, f"trainer={trainer}")
        return losses, whole(module), sha256(module)

    results = run_ranks(2, run)
    losses, weights, samples = alone
    check_losses(results, losses)
    for _, after, _ in results:
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)
    assert results[0][2] == results[1][2]
    assert (tmp_path / "samples.jsonl").read_text() == samples
    lines = [json.loads(line) for line in samples.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[1]["keys"] == [f"s{m}.tar/{n}" for m in range(4, 8) for n in range(2)]


@pytest.mark.parametrize("trainer", [pytest.param("ddp_sim", marks=pytest.mark.slow), "fsdp_sim"])
def test_two_ranks_learn_the_same_where_one_has_images_in_tiles(trainer, fit, run_ranks, tmp_path):
    options = [*OPTIM, "+model.tiles={newline: true}"]

    def run(rank):
        sharded = f"trainer={trainer}"
        module = fit(tmp_path / "2", 2, *options, sharded, steps=3, make=make_tiled_batch)[1]
        return whole(module)

    alone = whole(fit(tmp_path / "1", 1, *options, steps=3, make=make_tiled_batch)[1])
    assert "model.image_newline" in alone
    for weights in run_ranks(2, run):
        torch.testing.assert_close(weights, alone, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile
def test_compiled_blocks_of_two_ranks_learn_the_same(trainer, fit, alone, run_ranks, tmp_path):
    compiled = ["tuning.compile=[llm]", "+tuning.compiler.backend=eager"]

    def run(rank):
        _, module, losses = fit(tmp_path, 2, *OPTIM, *compiled, f"trainer={trainer}", steps=4)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return losses, graphs, list(module.state_dict())

    for losses, graphs, names in run_ranks(2, run):
        torch.testing.assert_close(losses, alone[0][:4], rtol=1e-4, atol=1e-5)
        assert graphs > 0, "nothing was compiled"
        assert not [name for name in names if "_orig_mod" in name]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_precision_trains_lora_in_shards_with_float32_angles(
    precision, fit, run_ranks, tmp_path
):
    words = ["tuning=lora", "tuning.lora.rank=4", "tuning.freeze=[]", "tuning.checkpointing=[llm]"]
    kept = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def run(rank):
        angles, options = Angles(), [*OPTIM, *words, "trainer=fsdp_sim"]
        _, module, losses = fit(
            tmp_path, 2, *options, f"trainer.precision={precision}", steps=2, callbacks=[angles]
        )
        digest = sha256(module.network)
        assert {p.dtype for p in module.network.state_dict().values()} == {kept}
        assert sha256(module.network) == digest, (
            "the hash reads the stored weights, not the gathered ones"
        )
        assert all_finite(module)
        return losses, angles.dtype, angles.worst

    _, _, expected = fit(tmp_path / "alone", 1, *OPTIM, *words, steps=2)
    for losses, dtype, worst in run_ranks(2, run):
        assert dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        assert worst == 0
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.02, "atol": 0}
        )
        torch.testing.assert_close(losses, expected, **close)


class Poison(Callback):
    """Puts NaN into one gradient of one rank, or into its loss, before the given steps."""

    def __init__(self, rank, steps):
        self.rank, self.steps = rank, steps
        self.states = {}

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            loss.data.fill_(torch.nan)

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps and trainer.global_rank == self.rank:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.view(-1)[0] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        tensors = [*pl_module.parameters()]
        tensors += [v for state in optimizer.state.values() for v in state.values()]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        self.states[trainer.global_step] = [t.detach().clone() for t in local]


@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_what_one_rank_finds_not_finite_no_rank_learns_from(trainer, fit, run_ranks, tmp_path):
    def run(rank):
        guard, poison = NonFiniteGuard(), Poison(1, [2, 3])
        callbacks = [poison, guard]
        _, module, _ = fit(tmp_path, 2, f"trainer={trainer}", steps=6, callbacks=callbacks)
        same = [
            all(map(torch.equal, poison.states[step], poison.states[step + 1]))
            for step in range(1, 6)
        ]
        return guard.state_dict(), same, all_finite(module)

    for state, same, finite in run_ranks(2, run):
        assert state == {"skipped": 2}
        assert same == [False, True, True, False, False]
        assert finite


def test_too_many_such_steps_end_all_ranks_with_one_line(fit, run_ranks, tmp_path):
    def run(rank):
        callbacks = [Poison(1, range(9)), NonFiniteGuard(max_skipped=1)]
        with pytest.raises(ValueError, match=r"step 2: .* 2 times, .*_skipped is 1: ") as caught:
            fit(tmp_path, 2, "trainer=ddp_sim", steps=6, callbacks=callbacks)
        return "\n" in str(caught.value)

    assert run_ranks(2, run) == [False, False]
