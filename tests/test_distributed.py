"""DDP and FSDP2 on CPU ranks take the steps that one process takes."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningDataModule
from torch.nn.utils import get_total_norm

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Tiles, VideoBatch, pad_rows
from experiments import evaluate, train
from experiments.needles import test_needles as run_needle_test
from experiments.report_data import load_run
from experiments.run import build, plain
from lightning_modules.callbacks import SampleAudit
from lightning_modules.guard import NonFiniteGuard
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.randomness import SeedByPosition
from lightning_modules.video_llm import VideoLLMModule
from lightning_modules.weights import all_finite, read_checkpoint, sha256

STEPS, PER_STEP = 20, 4  # micro-batches a step

#: All that makes ranks differ: guided pooling, BT-Adapter with videos of any length, dropout.
MODEL = [
    "pooler=prompt_guided_2x2",
    "model.encoder.config.vision.num_hidden_layers=3",
    "+model.encoder.bt_adapter={depth: 2, max_frames: 8}",
    "+model.llm.config.attention_dropout=0.1",
]


def make_batch(number):
    """Micro-batches of two rows: every third one is text alone, the others have videos."""
    rng = torch.Generator().manual_seed(number)
    rows = torch.randint(2, 2000, (2, 9), generator=rng).tolist()
    counts = [] if number % 3 == 1 else [1 + number % 4, 3]
    if counts:
        rows[0][2] = rows[1][1] = VISUAL_SLOT
    rows = [[*row[:6], 7, 8, 9 + number % 2] for row in rows]
    labels = [[IGNORE_INDEX] * 6 + row[6:] for row in rows]
    prompts = torch.randint(2, 2000, (2, 5), generator=rng)
    prompts[:, -1] = 1
    return VideoBatch(
        input_ids=pad_rows(rows, 0),
        attention_mask=torch.ones(2, 9, dtype=torch.bool),
        labels=pad_rows(labels, IGNORE_INDEX),
        frames=torch.randint(0, 256, (sum(counts), 3, 32, 32), generator=rng, dtype=torch.uint8),
        frame_counts=counts,
        prompt_ids=prompts,
        prompt_mask=torch.ones(2, 5, dtype=torch.bool),
        keys=[f"/data/s{number}.tar/{n}" for n in range(2)],
    )


def make_tiled_batch(number):
    """`make_batch`, where the second visual of every other micro-batch is an image in tiles."""
    batch = make_batch(number)
    tiles = [None, Tiles(1, 2, 20, 50) if number % 2 else None]
    return replace(batch, tiles=tiles if batch.frame_counts else [])


class Share:
    """Micro-batches r, r + world, ... of an epoch."""

    def __init__(self, rank, world, count, make):
        self._numbers, self._make = range(rank, count, world), make

    def __len__(self):
        return len(self._numbers)

    def __iter__(self):
        return map(self._make, self._numbers)


class Batches(LightningDataModule):
    audit = True

    def __init__(self, steps, make=make_batch):
        super().__init__()
        self._count, self._make = steps * PER_STEP, make

    def train_dataloader(self):
        return self._share(self._count)

    def val_dataloader(self):
        return self._share(PER_STEP)

    def _share(self, count):
        return Share(self.trainer.global_rank, self.trainer.world_size, count, self._make)


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


@pytest.fixture(scope="module")
def fit(compose, tiny):
    """`fit(folder, world, *overrides, ...)`: the shipped trainer over `Batches`."""

    def run(folder, world, *overrides, steps=STEPS, callbacks=(), checkpoint=None, make=make_batch):
        words = [*MODEL, *overrides, f"trainer.devices={world}"]
        config = compose([*tiny, *words], folder)
        optimizer = build(config.optim.optimizer, "optim")
        tuning = build(config.tuning, "tuning")
        module = VideoLLMModule(plain(config.model), optimizer, tuning=tuning)
        losses = Losses()
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[losses, SeedByPosition(0), SampleAudit(folder), *callbacks],
            logger=False,
            enable_checkpointing=False,
            accumulate_grad_batches=PER_STEP // world,
        )
        trainer.fit(module, datamodule=Batches(steps, make), ckpt_path=checkpoint)
        return trainer, module, losses.seen

    return run


#: With a large eps, as AdamW else makes whole steps of the rounding where a gradient is zero.
OPTIM = ["optim.optimizer.lr=2.0e-3", "+optim.optimizer.eps=3.0e-2"]


def whole(module):
    """Weights as every rank can see them."""
    with torch.no_grad():
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
            for name, p in module.named_parameters()
        }


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory):
    """Losses by micro-batch, weights and samples by step of one process."""
    folder = tmp_path_factory.mktemp("alone")
    _, module, losses = fit(folder, 1, *OPTIM)
    return losses, whole(module), (folder / "samples.jsonl").read_text()


#: LoRA with dropout, blocks that run again in the backward, groups with rates of their own, and a
#: norm that is clipped in every step: SGD takes steps of the clipped length.
TUNED = [
    "tuning=lora",
    "tuning.lora.rank=4",
    "tuning.lora.dropout=0.2",
    "tuning.checkpointing=[llm,encoder]",
    "tuning.freeze=[encoder.text]",
    "tuning.groups.llm.lr=0.1",
    "tuning.groups.encoder={lr: 0.01}",
    "tuning.groups.projector=null",
    "optim.optimizer._target_=torch.optim.SGD",
    "~optim.optimizer.betas",
    "optim.optimizer.fused=false",
    "optim.optimizer.lr=0.05",
    "trainer.gradient_clip_val=0.3",
]


class Norms(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(get_total_norm(gradients)))


@pytest.fixture(scope="module")
def alone_tuned(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    norms = Norms()
    _, module, losses = fit(folder, 1, *TUNED, callbacks=[norms])
    assert min(norms.seen) > 0.3, "each step was to be clipped"
    return losses, whole(module)


def in_turn(results):
    """Losses of two ranks in the order in which one process meets its micro-batches."""
    together = [loss for pair in zip(*(r[0] for r in results), strict=True) for loss in pair]
    assert len(together) == STEPS * PER_STEP
    return together


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
    torch.testing.assert_close(in_turn(results), losses, rtol=1e-4, atol=1e-5)
    assert sum(losses[:8]) > 1.1 * sum(losses[-8:])
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
    torch.testing.assert_close(in_turn(results), losses, rtol=1e-4, atol=1e-5)
    assert sum(losses[:8]) > 1.1 * sum(losses[-8:])
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

    for rank, (losses, graphs, names) in enumerate(run_ranks(2, run)):
        torch.testing.assert_close(losses, alone[0][rank : 4 * PER_STEP : 2], rtol=1e-4, atol=1e-5)
        assert graphs > 0, "nothing was compiled"
        assert not [name for name in names if "_orig_mod" in name]


class Angles(Callback):
    """How far cos is from that of float32 angles, rounded at the very end."""

    def __init__(self):
        self.worst, self.dtype = 0.0, None

    def on_train_start(self, trainer, pl_module):
        pl_module.network.llm.decoder.rotary_emb.register_forward_hook(self._compare)

    def _compare(self, rotary, args, output):
        x, _ = args
        with torch.autocast("cpu", enabled=False):
            frequencies, _ = rotary.frequencies(x.device, 1)
            reads = rotary.scheme.axes(frequencies.numel())
            turned = rotary.axis_positions.movedim(0, -1)[..., reads] * rotary.scheme.text_step
            cos = (turned.float() * frequencies.float()).cos().repeat(1, 1, 2)
        self.dtype = output[0].dtype
        self.worst = max(self.worst, (output[0] - cos.to(self.dtype)).abs().max().item())


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
        assert sha256(module.network) == digest, "of what is kept, not of what has travelled"
        assert all_finite(module)
        return losses, angles.dtype, angles.worst

    _, _, expected = fit(tmp_path / "alone", 1, *OPTIM, *words, steps=2)
    for rank, (losses, dtype, worst) in enumerate(run_ranks(2, run)):
        assert dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        assert worst == 0
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.02, "atol": 0}
        )
        torch.testing.assert_close(losses, expected[rank::2], **close)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sharded_checkpoint_of_two_ranks_is_resumed_by_any_number(
    world, fit, run_ranks, tmp_path_factory, tmp_path
):
    """From the end of an epoch; moments and the step count come along with the weights."""
    sharded = [*OPTIM, "trainer=fsdp_sim"]

    def save(rank):
        trainer, module, _ = fit(tmp_path / "first", 2, *sharded, steps=3)
        trainer.save_checkpoint(tmp_path / "saved")
        return sha256(module.network)

    def resume(rank):
        _, module, _ = fit(
            tmp_path / "on",
            world,
            *sharded,
            "trainer.max_epochs=2",
            steps=3,
            checkpoint=tmp_path / "saved",
        )
        return whole(module)

    (saved, _) = run_ranks(2, save)
    network = build_network(read_checkpoint(tmp_path / "saved"))
    assert sha256(network) == saved
    _, module, _ = fit(tmp_path / "alone", 1, *OPTIM, "trainer.max_epochs=2", steps=3)
    for weights in run_ranks(world, resume):
        torch.testing.assert_close(weights, whole(module), rtol=0, atol=1e-6)
    lines = (tmp_path / "on" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6]


@pytest.mark.slow
def test_a_sharded_checkpoint_with_lora_and_groups_is_resumed(fit, run_ranks, tmp_path):
    words = [*OPTIM, *TUNED[:5], "optim.optimizer.weight_decay=0.1"]
    words += ["tuning.groups.encoder={lr: 1.0e-3}", "tuning.decay_norms_and_biases=false"]
    sharded = [*words, "trainer=fsdp_sim"]

    def save(rank):
        trainer, _, _ = fit(tmp_path / "first", 2, *sharded, steps=3)
        trainer.save_checkpoint(tmp_path / "saved")

    def resume(rank):
        more, saved = "trainer.max_epochs=2", tmp_path / "saved"
        trainer, module, _ = fit(tmp_path / "on", 2, *sharded, more, steps=3, checkpoint=saved)
        names = [group["name"] for group in trainer.optimizers[0].param_groups]
        return whole(module), names

    run_ranks(2, save)
    assert build_network(read_checkpoint(tmp_path / "saved")).config.lora["alpha"] == 256
    trainer, module, _ = fit(tmp_path / "alone", 1, *words, "trainer.max_epochs=2", steps=3)
    expected = [group["name"] for group in trainer.optimizers[0].param_groups]
    assert "encoder_undecayed" in expected
    for weights, names in run_ranks(2, resume):
        assert names == expected
        torch.testing.assert_close(weights, whole(module), rtol=0, atol=1e-6)


def build_network(checkpoint):
    network = VideoLanguageModel(VideoLanguageModelConfig(**checkpoint["stages"]))
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    network.load_state_dict(weights)
    return network


class Poison(Callback):
    """NaN in one gradient of one rank, or in its loss, before the given steps."""

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


def test_sharded_ranks_generate_though_one_has_no_visual_and_one_ends_early(
    fit, run_ranks, compose, tiny, tmp_path
):
    batches = [make_batch(0), make_batch(1)]

    def generate(module, rank, eos=None):
        asked = batches[rank].questions()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        return module.network.generate(asked, eos_token_id=eos, **options)

    def run(rank):
        _, module, _ = fit(tmp_path, 2, *OPTIM, "trainer=fsdp_sim", steps=1)
        module.eval()
        free = generate(module, rank)
        torch.distributed.broadcast_object_list(ends := [free[:, 1].tolist()], 0)
        return ends[0], free, generate(module, rank, ends[0]), whole(module)

    results = run_ranks(2, run)
    module = VideoLLMModule(plain(compose([*tiny, *MODEL], tmp_path).model), torch.optim.AdamW)
    module.network.eval()
    module.load_state_dict(results[0][3], strict=False)  # tied weights are named once
    for rank, (ends, free, ended, _) in enumerate(results):
        assert torch.equal(free, generate(module, rank))
        assert torch.equal(ended, generate(module, rank, ends))
    lengths = [ended.shape[1] for _, _, ended, _ in results]
    assert lengths[0] < lengths[1], "the first rank was to end early"


def test_a_sharded_run_is_trained_tested_and_evaluated(tiny, compose, run_ranks, tmp_path):
    """The program's own main, its callbacks and its test; then the test of what it has saved."""
    words = [*tiny, "logger=csv", "trainer=fsdp_sim", "data.batch_size=2"]

    def run(rank):
        train.main.__wrapped__(compose(words, tmp_path))

    def evaluate_again(rank):
        config = compose(words, tmp_path / "again")
        model, steps = evaluate.load(tmp_path, None)
        trainer, datamodule = build(config.trainer, "trainer", logger=False), build(config.data, "")
        run_needle_test(config, trainer, model, datamodule, steps)
        return sha256(model)

    run_ranks(2, run)
    before = load_run(tmp_path)
    assert before.status == "tested"
    assert before.generations
    (tmp_path / "again").mkdir()
    hashes = run_ranks(2, evaluate_again)
    assert load_run(tmp_path / "again").needle.cells == before.needle.cells
    assert hashes == [sha256(evaluate.load(tmp_path, None)[0])] * 2


@pytest.mark.slow
def test_the_programs_start_their_ranks_and_one_process_finds_the_same(tiny, tmp_path):
    def program(name, *words):
        command = [sys.executable, "-m", f"experiments.{name}", *words, "logger=csv"]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    program("train", *tiny, "trainer=fsdp_sim", "data.batch_size=2", "hydra.run.dir=run")
    program("evaluate", "run=run", "hydra.run.dir=two")
    program("evaluate", "run=run", "hydra.run.dir=one", "trainer=cpu")
    run, two, one = (load_run(tmp_path / name).needle.cells for name in ("run", "two", "one"))
    assert run == two
    assert [c.correct for c in run["plain"]] == [c.correct for c in one["plain"]]


def test_a_sharded_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"stages": {}}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"io\.open, which is not opened"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "opened").exists()
