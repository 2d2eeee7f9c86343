"""Skipped steps, dropout by stream position, the audit, and the hash of the weights."""

import json

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.callbacks.guard import NonFiniteGuard
from lightning_modules.callbacks.randomness import SeedByPosition
from lightning_modules.callbacks.samples import without_folder
from lightning_modules.checkpoint.weights import finite_everywhere, sha256
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.finite import all_finite

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Tiny(LightningModule):
    """A model with one weight for each of 8 micro-batches. `fault` spoils the loss of some."""

    def __init__(self, optimizer, fault=lambda loss, batch_idx: loss):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self._optimizer, self._fault = optimizer, fault
        self.states = []

    def training_step(self, batch, batch_idx):
        return self._fault(self.layer(batch[0]).square().mean(), batch_idx)

    def configure_optimizers(self):
        return self._optimizer(self.parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        state = self.optimizers().state  # pyright: ignore
        tensors = [*self.parameters(), *(v for s in state.values() for v in s.values())]
        self.states.append([torch.as_tensor(t).detach().clone() for t in tensors])


def fit(module, *callbacks, **options):
    generator = torch.Generator().manual_seed(0)
    data = DataLoader([[torch.randn(4, generator=generator)] for _ in range(8)], batch_size=1)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=list(callbacks), **options)
    trainer.fit(module, data)
    return trainer


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5, momentum=0.9),
}
#: A NaN loss, Inf only in the gradients (a square root at zero), Inf only in the loss.
FAULTS = {
    "loss and gradients": lambda loss: loss * torch.nan,
    "gradients": lambda loss: loss + (loss - loss.detach()).sqrt(),
    "loss": lambda loss: loss + torch.inf,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_step_that_is_not_finite_changes_nothing(optimizer, fault):
    module = Tiny(optimizer, lambda loss, i: fault(loss) if i in (3, 6) else loss)
    guard = NonFiniteGuard()
    trainer = fit(module, guard, gradient_clip_val=1.0, log_every_n_steps=1)
    same = [
        all(map(torch.equal, a, b))
        for a, b in zip(module.states[:-1], module.states[1:], strict=True)
    ]
    assert same == [i in (3, 6) for i in range(1, 8)]
    assert trainer.callback_metrics["train/skipped_steps"] == guard.skipped == 2
    assert trainer.global_step == 8


def test_one_micro_batch_spoils_the_whole_step():
    module = Tiny(OPTIMIZERS["fused"], lambda loss, i: loss + torch.inf if i == 4 else loss)
    fit(module, guard := NonFiniteGuard(), accumulate_grad_batches=4)
    assert guard.skipped == 1
    assert all(map(torch.equal, module.states[3], module.states[7]))


def test_the_count_outlives_the_run_and_has_an_end():
    guard = NonFiniteGuard(max_skipped=3)
    fit(Tiny(OPTIMIZERS["fused"], lambda loss, i: loss * torch.nan if i < 3 else loss), guard)
    resumed = NonFiniteGuard(max_skipped=3)
    resumed.load_state_dict(guard.state_dict())
    module = Tiny(OPTIMIZERS["fused"], lambda loss, i: loss * torch.nan if i == 5 else loss)
    with pytest.raises(ValueError, match=r"step 6: .* NaN or Inf 4 times, .*max_skipped is 3: "):
        fit(module, resumed)
    assert all_finite(module)


def test_what_is_finite():
    assert finite_everywhere([torch.zeros(2), torch.zeros(0), torch.tensor(1e38).expand(9)])
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not finite_everywhere([torch.zeros(2), torch.tensor([1.0, bad])])
        assert not finite_everywhere([torch.tensor(bad, dtype=torch.bfloat16)])
    layer = nn.Linear(2, 2)
    assert all_finite(layer)
    layer.bias.data[1] = torch.nan
    assert not all_finite(layer)
    layer.bias.requires_grad_(False)
    assert all_finite(layer), "frozen weights are not checked"


def test_the_hash_is_of_names_shapes_and_values():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    before = sha256(layer)
    assert sha256(nn.Sequential(*reversed(layer))) != before
    assert sha256(layer.bfloat16()) != before
    assert sha256(layer) == sha256(layer.float()), "bfloat16 is truncated float32"
    assert sha256(nn.ModuleDict({"_orig_mod": layer})) == sha256(layer), "as torch.compile names it"
    layer[0].weight.data[0, 0] += 1e-3
    changed = sha256(layer)
    layer[1].requires_grad_(False)
    assert len({before, changed, sha256(layer)}) == 3


def test_the_position_decides_the_random_numbers():
    class Drawn(Tiny):
        def training_step(self, batch, batch_idx):
            self.drawn.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    def draw(seed, **options):
        module = Drawn(OPTIMIZERS["fused"])
        module.drawn = []
        fit(module, SeedByPosition(seed), **options)
        return module.drawn

    first, again, other = draw(0), draw(0, accumulate_grad_batches=2), draw(1)
    assert first == again
    assert len({*first, *other}) == 16


def test_what_draws_outside_of_training_is_not_disturbed():
    """Random numbers between micro-batches equal those of a run without the callback."""

    class Between(Tiny):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.drawn.append(torch.rand(()).item())

    def draw(*callbacks):
        module = Between(OPTIMIZERS["fused"])
        module.drawn = []
        torch.manual_seed(5)
        fit(module, *callbacks)
        return module.drawn

    plain, seeded = draw(), draw(SeedByPosition(5))
    assert len(set(seeded)) == 8
    assert plain == seeded


def weights(folder):
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_dropout_and_audit_of_a_killed_run(run_train, tmp_path, monkeypatch):
    """Lines of steps after the checkpoint are removed, and so is a torn line."""
    options = [
        "data.audit=true",
        "+model.llm.config.attention_dropout=0.3",
        "callbacks.checkpoint.every_n_steps=5",
    ]
    options += ["test=false", "callbacks.generations=null"]
    run_train(tmp_path / "whole", *options)

    step = VideoLLMModule.training_step

    def dying(self, batch, batch_idx):
        if batch_idx == 8:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VideoLLMModule, "training_step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(tmp_path / "cut", *options)
    samples = tmp_path / "cut" / "samples.jsonl"
    assert len(samples.read_text().splitlines()) == 8
    with samples.open("a") as file:
        file.write('{"step": 9, "keys": ["#3')

    run_train(tmp_path / "cut", *options)
    assert samples.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [key for line in lines for key in line["keys"]] == [f"#{n}" for n in range(48)]
    torch.testing.assert_close(
        weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("/data/set/s1.tar/000/7", "s1.tar/000/7"),
        ("http://host/a.tar/b/s1.tar/7", "s1.tar/7"),
        ("s1.tar/7", "s1.tar/7"),
        ("#12", "#12"),
    ],
)
def test_keys_of_the_audit_name_no_folder(key, short):
    assert without_folder(key) == short
