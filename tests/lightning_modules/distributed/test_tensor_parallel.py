"""Ranks that split the layers of the LLM learn the same as a single process."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from datamodules.batch import data_rank
from datamodules.errors import BadSampleError
from datamodules.stream.loader import Faults
from experiments import train
from experiments.planning.forecast import is_sharded
from experiments.run.compose import build, plain, share_steps
from lightning_modules.callbacks import throughput
from lightning_modules.callbacks.guard import NonFiniteGuard
from lightning_modules.callbacks.randomness import SeedByPosition
from lightning_modules.callbacks.samples import BadSamples, SampleAudit
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.checkpoint.weights import read_checkpoint, sha256
from lightning_modules.distributed.sharding import shard
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.tiny_fit import (
    OPTIM,
    PER_STEP,
    STEPS,
    Batches,
    Losses,
    Norms,
    Share,
    build_network,
    check_program,
    make_batch,
    whole,
)

#: Grouped queries with biases, positions on three axes, dropout in layers that are not split.
MODEL = [
    "rotary=videorope",
    "pooler=prompt_guided_2x2",
    "+model.encoder.config.vision.attention_dropout=0.1",
    "model.llm.config.num_attention_heads=4",
    "model.llm.config.num_key_value_heads=2",
]
CLIP = 0.1
TP = ["trainer=fsdp_tp_sim"]


class Rows(Batches):
    """Ranks of one group read the same. One sample of each group's first batch was bad."""

    trained_samples = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.faults = {"train": Faults("skip")}

    def train_dataloader(self):
        self.faults["train"].add(BadSampleError("broken"))
        return super().train_dataloader()

    def _share(self, count):
        return Share(*data_rank(self.trainer), count, self._make)


@pytest.fixture(scope="module")
def fit(compose, tiny):
    """`fit(folder, *overrides, ...)` runs the shipped trainer over `Rows`. All steps are equal."""

    def run(folder, *overrides, steps=STEPS, callbacks=(), checkpoint=None):
        words = [*OPTIM, *MODEL, f"trainer.gradient_clip_val={CLIP}", *overrides]
        config = compose([*tiny, *words], folder)
        optimizer, tuning = build(config.optim.optimizer, ""), build(config.tuning, "")
        module = VideoLLMModule(plain(config.model), optimizer, tuning=tuning)
        losses = Losses()
        callbacks = [losses, SeedByPosition(0), SampleAudit(folder), *callbacks]
        options = {"logger": False, "enable_checkpointing": False}
        trainer = build(config.trainer, "trainer", callbacks=callbacks, **options)
        trainer.accumulate_grad_batches = PER_STEP // data_rank(trainer)[1]
        trainer.fit(module, datamodule=Rows(steps), ckpt_path=checkpoint)
        return trainer, module, losses.seen

    return run


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory):
    folder, norms = tmp_path_factory.mktemp("alone"), Norms()
    _, module, losses = fit(folder, callbacks=[norms])
    assert min(norms.seen) > CLIP, "each step must be clipped"
    return losses, whole(module), (folder / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_ranks_that_share_layers_learn_what_one_process_learns(
    devices, fit, alone, run_ranks, tmp_path
):
    """1 x 2 and 2 x 2 ranks. A fused AdamW clips every step."""

    def run(rank):
        faults = BadSamples()
        words = [*TP, f"trainer.devices={devices}"]
        trainer, module, losses = fit(tmp_path, *words, callbacks=[faults, NonFiniteGuard()])
        layer = module.network.llm.blocks()[0].self_attn.q_proj
        pieces = layer.weight.to_local().shape, layer.out_features
        agreed = trainer.datamodule.faults["train"].agreed
        return losses, whole(module), sha256(module), pieces, agreed

    results = run_ranks(devices, run)
    losses, weights, samples = alone
    assert len(losses) == STEPS
    assert sum(losses[:2]) > 1.03 * sum(losses[-2:]), "the loss must fall, even with clipped steps"
    for own, after, digest, ((rows, _), width), agreed in results:
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)
        assert digest == results[0][2]
        assert rows == width // devices, "the layer must be split"
        assert agreed == {"broken": devices // 2}
        torch.testing.assert_close(own, losses, rtol=0, atol=1e-5)
    assert (tmp_path / "samples.jsonl").read_text() == samples


LORA = ["tuning=lora", "tuning.lora.rank=4", "tuning.lora.dropout=0.0", "tuning.freeze=[]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        ([*LORA, "tuning.checkpointing=[llm,encoder]"], 1e-5),
        ([*LORA, "tuning.lora.dropout=0.2", "tuning.lora.targets=[q_proj,v_proj,up_proj]"], 1e-5),
        (["tuning.compile=[llm]", "+tuning.compiler.backend=eager"], 1e-5),
        (["llm=tiny_llama", "rotary=mrope", "trainer.gradient_clip_algorithm=value"], 1e-5),
        (["trainer.precision=bf16-mixed"], 0.05),
        (["trainer.precision=bf16-true"], 0.05),
    ],
    ids=["lora", "lora_dropout", "compile", "llama_clip_value", "bf16_mixed", "bf16_true"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile
def test_what_is_tuned_how_is_the_same_in_split_layers(words, tolerance, fit, run_ranks, tmp_path):
    clip = ["trainer.gradient_clip_algorithm=norm"]
    exact = tolerance == 1e-5

    def run(rank):
        _, module, losses = fit(tmp_path / "two", *clip, *words, *TP, steps=4)
        return losses, whole(module)

    _, module, expected = fit(tmp_path / "one", *clip, *words, steps=4)
    for losses, weights in run_ranks(2, run):
        torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)
        if exact:
            torch.testing.assert_close(weights, whole(module), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["trainer=fsdp_tp_sim", "trainer.devices=4"], ["trainer=fsdp_sim", "trainer.devices=1"]),
        (["trainer=fsdp_tp_sim", "trainer.devices=2"], ["trainer=fsdp_sim", "trainer.devices=2"]),
        (["trainer=fsdp_sim", "trainer.devices=2"], ["trainer=fsdp_tp_sim", "trainer.devices=4"]),
    ],
    ids=["2x2_to_1", "1x2_to_2", "2_to_2x2"],
)
def test_a_checkpoint_of_one_layout_is_resumed_in_another(
    before, after, fit, run_ranks, tmp_path_factory, tmp_path
):
    """With the optimizer's moments, from the end of an epoch. It can be read without ranks, too."""
    saved, more = tmp_path / "saved", "trainer.max_epochs=2"

    def save(rank):
        trainer, module, _ = fit(tmp_path / "first", *before, steps=3)
        trainer.save_checkpoint(saved)
        return sha256(module.network)

    def resume(rank):
        _, module, _ = fit(tmp_path / "on", *after, more, steps=3, checkpoint=saved)
        return whole(module)

    digest, *_ = run_ranks(int(before[1][-1]), save)
    assert sha256(build_network(read_checkpoint(saved))) == digest
    _, module, _ = fit(tmp_path / "alone", more, steps=3)
    for weights in run_ranks(int(after[1][-1]), resume):
        torch.testing.assert_close(weights, whole(module), rtol=0, atol=1e-6)


class Kill(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_rows(compose, tiny, run_train, run_ranks, tmp_path):
    """In the middle of an epoch: 2 x 2 ranks, two ranks without tensor parallelism, then 1 x 2."""
    words = [*MODEL, "data.batch_size=2", "data.audit=true", "test=false", "pooler=average_2x2"]
    words += ["callbacks.checkpoint.every_n_steps=2", "+optim.optimizer.eps=3.0e-2"]
    parts = [("fsdp_tp_sim", 4, 5), ("fsdp_sim", 2, 9), ("fsdp_tp_sim", 2, None)]

    def part(trainer, devices, step, rank):
        stop = (
            "{_target_: tests.lightning_modules.distributed.test_tensor_parallel.Kill, step: "
            + str(step)
            + "}"
        )
        stops = [f"+callbacks.kill={stop}"] if step else []
        layout = [f"trainer={trainer}", f"trainer.devices={devices}"]
        config = compose([*tiny, *words, "logger=csv", *layout, *stops], tmp_path / "run")
        if step is None:
            return train.main.__wrapped__(config)
        with pytest.raises(RuntimeError, match="killed"):
            train.main.__wrapped__(config)

    (tmp_path / "run").mkdir()
    for trainer, devices, step in parts:
        run_ranks(devices, partial(part, trainer, devices, step))
    (tmp_path / "alone").mkdir()
    run_train(tmp_path / "alone", *words)
    found, expected = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("run", "alone")
    )
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=1e-6)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("run", "alone")]
    assert samples[0] == samples[1]
    assert len(samples[0].splitlines()) == 12


@pytest.mark.slow
def test_split_layers_are_tested_and_evaluated(compose, tiny, run_ranks, tmp_path):
    words = [*tiny, *MODEL, *TP, "pooler=average_2x2", "logger=csv", "data.batch_size=2"]
    check_program(words, compose, run_ranks, tmp_path)


@pytest.mark.slow
def test_rows_generate_though_one_has_no_visual(fit, run_ranks, compose, tiny, tmp_path):
    """All ranks of a group read the same; each group reads its own samples."""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run(rank):
        _, module, _ = fit(tmp_path, *TP, "trainer.devices=4", steps=1)
        module.eval()
        asked = make_batch(rank // 2).questions()
        return module.network.generate(asked, **options), whole(module)

    results = run_ranks(4, run)
    config = compose([*tiny, *MODEL], tmp_path)
    module = VideoLLMModule(plain(config.model), torch.optim.AdamW)
    module.network.eval()
    module.load_state_dict(results[0][1], strict=False)  # tied weights are named once
    for rank, (generated, _) in enumerate(results):
        asked = make_batch(rank // 2).questions()
        assert torch.equal(generated, module.network.generate(asked, **options))


@pytest.mark.slow
def test_tokens_and_flops_of_shared_layers_count_once(fit, run_ranks, tmp_path, monkeypatch):
    """The clock ticks at each look, so two ranks do the same work in the same time."""

    def measure(folder, *words):
        ticks = itertools.count()
        clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
        monkeypatch.setattr(throughput, "time", clock)
        trainer, _, _ = fit(folder, *words, steps=2, callbacks=[Throughput(peak_flops=1e9)])
        metrics = trainer.callback_metrics
        return float(metrics["train/tokens_per_s"]), float(metrics["train/mfu"])

    tokens, mfu = measure(tmp_path / "one")
    for found in run_ranks(2, lambda rank: measure(tmp_path / "two", *TP)):
        assert found == pytest.approx((tokens, mfu / 2))


class Noise(Callback):
    """A change of the gradients of one rank: small, as by another order of sums, or large."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_rank == 1:
            pl_module.network.projector.linear_1.weight.grad.to_local().mul_(1.5)


@pytest.mark.slow
def test_a_row_keeps_the_same_weights_where_its_ranks_round_otherwise(fit, run_ranks, tmp_path):
    def run(rank):
        _, module, _ = fit(tmp_path, *TP, steps=2, callbacks=[Noise()])
        return whole(module)

    first, second = run_ranks(2, run)
    assert all(torch.equal(first[name], second[name]) for name in first)


def mesh_of(size):
    """A mesh of ranks that do not exist."""
    return DeviceMesh("cpu", torch.arange(size), _init_backend=False, _rank=0)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, 4, "size=4 does not divide 8 attention heads, 2 .* set it to 1, 2$"),
        ({}, 3, "size=3 does not divide 8 attention heads, 2 key/value heads, 64 channels"),
        ({"intermediate_size": 63}, 2, "63 channels of the MLP of model.llm: set it to 1$"),
        ({"attention_dropout": 0.1}, 2, "model.llm.config.attention_dropout=0"),
        ({"model_type": "qwen3"}, 2, "qwen3.* as replicated_with_grad_allreduce, .* Llama or Qw"),
    ],
)
def test_layers_that_cannot_be_shared_are_refused_in_one_line(fields, size, message):
    config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    llm = CausalLM(config={**config, "vocab_size": 8, **fields})
    with pytest.raises(ValueError, match=message) as caught:
        llm.split(mesh_of(size))
    assert "\n" not in str(caught.value)


def test_dropout_of_lora_inside_of_split_layers_is_refused(compose, tiny, tmp_path):
    config = compose([*tiny, *MODEL, "tuning=lora", "tuning.lora.rank=4"], tmp_path)
    module = VideoLLMModule(plain(config.model), list, tuning=build(config.tuning, ""))
    with pytest.raises(ValueError, match=r"dropout=0.05 on self_attn.o_proj: .* tuning.lora.targ"):
        module.network.llm.split(mesh_of(2))


def test_a_stage_without_llm_is_refused(run_ranks):
    def run(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        axes = ("data_parallel", "tensor_parallel")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=axes)
        with pytest.raises(ValueError, match="this stage of training has no llm: set trainer=fsdp"):
            shard(nn.Linear(2, 2), [], mesh)

    run_ranks(2, run)


@pytest.fixture(scope="module")
def recipe(compose, tiny, tmp_path_factory):
    return compose([*tiny, *TP, "data.batch_size=2"], tmp_path_factory.mktemp("recipe"))


def shared(recipe, devices, size=2):
    """A trainer that runs nothing, but knows how steps are shared."""
    strategy = {**recipe.trainer.strategy, "tensor_parallel_size": size}
    settings = {**recipe.trainer, "strategy": strategy, "devices": devices, "logger": False}
    trainer = build(settings, "trainer")
    share_steps(trainer, build(recipe.data, "data"))
    return trainer


@pytest.mark.parametrize(
    ("devices", "size", "message"),
    [
        (3, 2, "tensor_parallel_size=2 does not divide 3 ranks"),
        (6, 2, r"on 3 ranks: .* numbers of ranks: 1, 2 \(ranks of 2 processes each, "),
        (2, 0, "size is 0; set it to 1 or more"),
    ],
)
def test_ranks_that_make_no_rows_are_refused_in_one_line(devices, size, message, recipe):
    with pytest.raises(ValueError, match=message):
        shared(recipe, devices, size)


def test_rows_share_the_steps(recipe):
    trainer = shared(recipe, 4)
    assert data_rank(trainer) == (0, 2)
    assert trainer.accumulate_grad_batches == 1


def test_a_plan_of_split_layers_is_refused(recipe):
    with pytest.raises(ValueError, match="knows no tensor parallelism: plan with trainer=fsdp"):
        is_sharded(recipe)
