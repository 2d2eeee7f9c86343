"""Blocks that are recomputed or compiled give the same results, dropout included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoint.weights import sha256
from lightning_modules.training.tuning import Tuning
from tests.helpers.tuned import BATCH, LORA, hidden, make_module


def step_of(tuning, attention_dropout=0.0, bt_adapter=None, pooler="prompt_guided"):
    """Returns loss and gradients of one training step, with dropout."""
    module = make_module(tuning, bt_adapter=bt_adapter, pooler=pooler)
    network = module.network.train()
    network.llm.lm.config.attention_dropout = attention_dropout
    for layer in network.llm.blocks():
        layer.self_attn.attention_dropout = attention_dropout
    torch.manual_seed(1)
    loss = network(BATCH).loss
    loss.backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return network, loss, gradients


class Kept:
    """Counts the bytes that the forward keeps for the backward."""

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_):
        self._hooks.__exit__()

    def _pack(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("stages", [["llm"], ["encoder"], ["llm", "encoder"]])
def test_recomputed_blocks_give_the_same_gradients_dropout_included(stages):
    options = {"attention_dropout": 0.3, "bt_adapter": {"depth": 2, "max_frames": 8}}
    lora = {"lora": LORA | {"dropout": 0.5}} if stages == ["llm"] else {}
    with Kept() as all_kept:
        _, loss, expected = step_of(Tuning(**lora), **options)
    with Kept() as kept:
        network, again, gradients = step_of(Tuning(**lora, checkpointing=stages), **options)
    assert torch.equal(again, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert kept.bytes < 0.8 * all_kept.bytes
    _, other, _ = step_of(Tuning(**lora), **options | {"attention_dropout": 0.0})
    assert other != loss, "dropout must change the result"
    assert torch.equal(hidden(network), hidden(network)), "evaluation must not change"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile
def test_compiled_blocks_give_the_same_and_keep_their_names():
    network, loss, gradients = step_of(Tuning(), pooler="average")
    torch._dynamo.utils.counters.clear()
    compiled = Tuning(compile=["llm"], compiler={"backend": "eager"})
    again, same_loss, same_gradients = step_of(compiled, pooler="average")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert list(again.state_dict()) == list(network.state_dict())
    assert sha256(again) == sha256(network)
    torch._dynamo.reset()


COMPILE = """
import sys, torch
from tests.lightning_modules.test_blocks import step_of
from tests.helpers.tuned import LORA
from lightning_modules.training.tuning import Tuning
from lightning_modules.checkpoint.weights import sha256
from tests.helpers.finite import all_finite
torch.set_num_threads(1)
for extra in ({}, {"lora": LORA, "checkpointing": ["llm"]}):
    network, loss, gradients = step_of(Tuning(**extra), pooler="average")
    compiled = Tuning(**extra, compile=["llm", "encoder"], compiler={"backend": sys.argv[1]})
    torch._dynamo.utils.counters.clear()
    again, same_loss, same_gradients = step_of(compiled, pooler="average")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(same_loss, loss)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert sha256(again) == sha256(network)
print("same")
"""


LENGTHS = """
import random, sys, torch
from tests.lightning_modules.test_model import S, make_batch
from tests.helpers.tuned import make_module
from lightning_modules.training.tuning import Tuning
torch.set_num_threads(1)
def batch_of(number):
    draw, rows, counts = random.Random(number), [], []
    for _ in range(draw.randint(2, 5)):
        rows.append([draw.randint(1, 40) for _ in range(draw.randint(4, 30))])
        if draw.random() < 0.7:
            rows[-1][1] = S
            counts.append(2 * draw.randint(1, 4))
    return make_batch(rows, counts, seed=number)
stages, count = ["llm", "encoder"], int(sys.argv[2])
options = {"bt_adapter": {"depth": 2, "max_frames": 8}, "pooler": "prompt_guided"}
tuning = Tuning(checkpointing=stages)
compiled = Tuning(checkpointing=stages, compile=stages, compiler={"backend": sys.argv[1]})
networks = [make_module(t, **options).network.train() for t in (tuning, compiled)]
graphs = []
for batch in map(batch_of, range(count)):
    losses = [network(batch, packing=48).loss for network in networks]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
for plain, found in zip(*(network.parameters() for network in networks)):
    if plain.grad is not None:
        torch.testing.assert_close(found.grad, plain.grad, rtol=1e-4, atol=1e-6)
tried = torch._dynamo.utils.counters["frames"]
assert tried["ok"] == tried["total"], f"some run uncompiled: {tried}"
assert graphs[-1] == graphs[count // 2] <= 16 or count < 10, graphs
print("same")
"""


def run_uninstrumented(script, *arguments):
    """In its own process, because torch.compile cannot read the wrappers that check shapes."""
    root = Path(__file__).parents[2]
    env = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.endswith("same\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_any_way_blocks_give_the_same(backend):
    run_uninstrumented(COMPILE, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "batches"), [("eager", 20), ("aot_eager", 2)])
def test_packed_and_recomputed_blocks_are_compiled_for_all_lengths_at_once(backend, batches):
    """Batches of other lengths, rows and frames. After ten of them nothing is compiled again."""
    run_uninstrumented(LENGTHS, backend, str(batches))
