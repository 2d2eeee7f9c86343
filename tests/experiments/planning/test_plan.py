"""Forecasts on fake tensors equal the measurements of a real step."""

import re
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from experiments import CONFIG_DIR, plan
from experiments.planning.forecast import _steps, check_plan, default_ranks, forecast, samples_of
from experiments.planning.largest_sample import Largest
from experiments.planning.rehearsal import rehearse
from experiments.run.compose import build, plain
from lightning_modules.spec import build as build_stage
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.real_step import take_real

WORDS = [
    "experiment=resume_probe",
    "data.frames.sampler.num_frames=8",
    "tokens=96",
    "data.batch_size=2",
    "model.llm.config.tie_word_embeddings=false",
    "model.llm.config.attention_dropout=0.0",
]


@pytest.fixture(scope="module")
def planned(compose, tmp_path_factory):
    """`planned(*overrides, ranks=1)` returns config and forecast of a tiny recipe."""

    def run(*overrides, ranks=1):
        config = compose([*WORDS, *overrides], tmp_path_factory.mktemp("plan"), "plan")
        return config, forecast(config, ranks)

    return run


@pytest.fixture(scope="module")
def alone(planned):
    return planned()


@pytest.fixture(scope="module")
def real(alone):
    return take_real(alone[0])


def test_kernels_that_only_a_gpu_has_are_planned_as_sdpa(planned, alone):
    words = ["model.llm.attention=flash_attention_2", "model.encoder.attention=flex_attention"]
    assert planned(*words)[1].step == alone[1].step


def test_weights_gradients_and_moments_are_the_real_ones_to_the_byte(alone, real):
    memory = alone[1].step.memory
    kept = (memory["weights"], memory["gradients"], memory["optimizer"])
    assert kept == (real.weights, real.gradients, real.optimizer)


def test_flops_are_those_of_the_real_step(alone, real):
    assert alone[1].step.computed == real.flops
    assert sum(alone[1].step.flops.values()) == pytest.approx(real.flops, rel=0.02)


def test_the_peak_is_what_the_allocator_gives_out(alone, real):
    """Weights, gradients and moments exist before the recorded step."""
    memory = alone[1].step.memory
    kept = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert alone[1].step.peak - kept == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["experiment=my_videos"], 1),
        (["experiment=videorope_qwen2_7b"], 8),
        (["data.global_batch_size=12", "data.batch_size=2"], 6),
    ],
)
def test_without_ranks_as_many_are_planned_as_share_a_step(words, ranks, compose, tmp_path):
    config = compose(words, tmp_path, "plan")
    assert config.ranks is None
    assert default_ranks(config) == ranks


class Checkpointed(VideoLLMModule):
    def configure_model(self):
        super().configure_model()
        for block in self.network.blocks():
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@pytest.mark.slow
def test_blocks_that_run_twice_are_planned_as_they_run(alone):
    """Memory that is freed during the step does not count, for any number of blocks."""
    config, plainly = alone
    spec = plain(config.model)
    spec["llm"]["config"] |= {"num_hidden_layers": 8, "intermediate_size": 256}
    optimizer = build(config.optim.optimizer, "optim")
    data, sample = build(config.data, "data"), Largest.of(config)
    found = rehearse(
        Checkpointed(spec, optimizer),
        lambda network, fake: data.outlined(sample.outline(network, fake)),
        ranks=1,
        sharded=False,
        accumulation=4,
        clip=1.0,
    )
    kept = sum(found.memory[kind] for kind in ("weights", "gradients", "optimizer"))
    real = take_real(config, Checkpointed(spec, optimizer))
    assert found.computed == real.flops > 1.1 * sum(found.flops.values())
    assert found.peak - kept == pytest.approx(real.peak, rel=0.02)
    assert plainly.step.computed < 1.01 * sum(plainly.step.flops.values())


def test_weights_of_bfloat16_are_half_of_it(alone, planned):
    found = planned("trainer.precision=bf16-true")[1].step
    assert found.memory["weights"] == pytest.approx(alone[1].step.memory["weights"] / 2, rel=0.05)


def test_a_plan_leaves_no_rank_of_its_own_behind(planned, run_ranks):
    planned("trainer=fsdp_sim", ranks=2)

    def place(rank):
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        names = ("data_parallel", "tensor_parallel")
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=names)["data_parallel"]
        weight = distribute_tensor(torch.zeros(32), mesh, [Shard(0)])
        found = weight.detach().device_mesh.get_coordinate()
        distributed.destroy_process_group()
        return found

    assert run_ranks(2, place) == [(0,), (1,)]


@pytest.mark.slow
def test_a_rank_of_eight_keeps_an_eighth(alone, planned):
    whole = alone[1].step
    _, found = planned("trainer=fsdp_sim", "data.global_batch_size=16", ranks=8)
    for kind in ("weights", "optimizer"):
        pieces = 8 * found.step.memory[kind]
        assert whole.memory[kind] < pieces * 1.001, "the shards must hold all of it"
        assert pieces < 1.5 * whole.memory[kind], "padding of small tensors aside"
    assert found.step.parameters == whole.parameters
    assert found.step.flops == whole.flops
    assert found.step.memory["gathered"] > 0


@pytest.mark.slow
def test_ddp_keeps_everything_and_a_copy_of_the_gradients(alone, planned):
    _, found = planned("trainer=ddp_sim", ranks=2)
    assert found.step.memory["weights"] == alone[1].step.memory["weights"]
    assert found.step.memory["gathered"] == 4 * found.step.trained


@pytest.fixture(scope="module")
def at_once(planned):
    """Returns a step with one micro-batch, where the other one has four."""
    words = ["data.global_batch_size=2", "mfu=0.5", "device.peak_flops=1.0e12", "samples=6400"]
    return planned(*words)


def test_accumulation_repeats_the_micro_batch(alone, at_once):
    assert (alone[1].accumulation, at_once[1].accumulation) == (4, 1)
    assert at_once[1].step.flops == alone[1].step.flops
    assert at_once[1].step.peak <= alone[1].step.peak, (
        "the old gradients are freed before the backward"
    )


def test_time_and_hours_follow_from_the_stated_share_of_the_peak(at_once):
    config, found = at_once
    assert found.seconds == pytest.approx(found.step.computed / 0.5e12)
    assert found.tokens_per_s == pytest.approx(2 * 96 / found.seconds)
    assert found.steps == 6400 // 2 * config.trainer.max_epochs
    assert found.gpu_hours == pytest.approx(found.steps * found.seconds / 3600)
    assert found.epoch_gpu_hours == pytest.approx(found.gpu_hours / config.trainer.max_epochs)
    twice = replace(found, ranks=2)
    assert twice.gpu_hours == pytest.approx(2 * found.gpu_hours)
    assert twice.hours == pytest.approx(found.hours)
    assert found.on(0.25, 1e12).hours == pytest.approx(2 * found.hours)


@pytest.mark.parametrize(
    ("recipe", "samples", "steps"),
    [
        ("videorope_qwen2_7b", 330_000, 330_000 // 128),
        ("ppllava_dpo", 17_000, 17_000 // 64 * 2),
        ("ppllava_vicuna7b_multi_image", 1_300_000, 1_300_000 // 128),
        ("clip_context", 1_000_000, 1_000_000 // 1024 * 2),
        ("vniah_d_tiny", 3960, 330),
    ],
)
def test_a_recipe_says_how_many_samples_it_has(recipe, samples, steps, compose, tmp_path):
    config = compose([f"experiment={recipe}"], tmp_path, "plan")
    assert samples_of(config) == samples
    assert _steps(config, config.data.global_batch_size)[0] == steps
    config = compose([f"experiment={recipe}", "samples=12800"], tmp_path, "plan")
    assert samples_of(config) == 12800


def test_tiny_recipes_have_as_many_samples_as_they_make(compose, tmp_path):
    for recipe in ("videorope_qwen2_7b", "clip_context", "ppllava_dpo"):
        config = compose([f"experiment={recipe}", "scale=tiny"], tmp_path, "plan")
        assert samples_of(config) == sum(config.prepare.counts.train)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("ranks=[0]", "ranks=.* must be whole numbers of 1 or more: ranks=8,64"),
        ("ranks=many", "ranks=many must be whole numbers"),
        ("samples=0", "samples=0 must be a whole number of 1 or more"),
        ("samples=1.5", "samples=1.5 must be"),
        ("mfu=40", "mfu=40 must be a share"),
        ("mfu=0", "mfu=0 must be a share"),
        ("headroom=1", "headroom=1 must be a share"),
        ("videos=-1", "videos=-1 must be a whole number of 0 or more"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(word, says, compose, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        check_plan(compose([*WORDS, word], tmp_path, "plan"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "option", "parameters"),
    [
        ("llm", "qwen2_7b", 7_615_616_512),  # as on the models' pages on the hub
        ("llm", "vicuna_7b", 6_738_415_616),
    ],
)
def test_known_sizes_make_the_published_models(group, option, parameters, compose, tmp_path):
    config = compose([f"{group}={option}"], tmp_path, "plan")
    spec = plain(config.model[group])
    spec |= {"source": None, "config": plain(config.sizes[spec["source"]])}
    with torch.device("meta"):
        stage = build_stage(spec)
    assert sum(p.numel() for p in stage.parameters()) == parameters


@pytest.mark.slow
def test_a_hub_id_is_planned_without_its_weights(planned, compose, tmp_path):
    sizes = plain(compose(WORDS, tmp_path, "plan").model.llm.config)
    fields = ",".join(f"{k}: {v}" for k, v in sizes.items() if k != "rope_parameters")
    fields = fields.replace("True", "true").replace("False", "false")
    words = ["model.llm.source=some/model", "model.llm.dtype=bfloat16"]
    _, found = planned(*words, f"+sizes={{some/model: {{{fields}}}}}")
    assert found.step.parameters > 0
    with pytest.raises(ValueError, match="sizes of no/model"):
        planned("model.llm.source=no/model")


@pytest.mark.parametrize(
    ("overrides", "ranks", "says"),
    [
        (["data.global_batch_size=8"], 3, "legal batch sizes for 3 ranks|legal global batch"),
        (["tokens=10"], 1, "8 frames are 32 tokens, but tokens=10"),
        (["trainer.strategy={_target_: x, tensor_parallel_size: 2}"], 2, "no tensor parallelism"),
    ],
)
def test_what_cannot_be_is_refused(overrides, ranks, says, planned):
    with pytest.raises(ValueError, match=says):
        planned(*overrides, ranks=ranks)


@pytest.fixture
def printed(compose, tmp_path, capsys):
    def run(*words):
        plan.plan.__wrapped__.__wrapped__(compose([*WORDS, *words], tmp_path, "plan"))
        return capsys.readouterr().out.splitlines()

    return run


def test_the_program_prints_a_line_for_each_world(printed):
    lines = printed("ranks=[2,3]", "trainer=fsdp_sim", "device.memory_gib=0.001", "advise=false")
    (row,) = (line.split() for line in lines if re.match(r" +2 +8 = 2 x 2 x 2 ", line))
    assert row[-7:-3] == ["-"] * 4  # no number of samples is known
    assert any("samples=N gives steps and hours" in line for line in lines)
    assert row[-3:] == ["does", "not", "fit"]
    assert re.search(r"^ +3 .*legal numbers of ranks: 1, 2, 4", lines[-1])


def test_every_device_has_a_line(printed, capsys):
    lines = printed("ranks=[1]", "every_device=true", "samples=64000")
    head = next(n for n, line in enumerate(lines) if line.split()[:1] == ["device="])
    names = [line.split()[0] for line in lines[head + 1 :]]
    assert names == sorted(path.stem for path in (CONFIG_DIR / "device").glob("*.yaml"))
    rows = {line.split()[0]: line.split() for line in lines[head + 1 :]}
    assert all(row[2] == "yes" for row in rows.values())
    speed = float(rows["h100"][4].replace(",", "")) / float(rows["a100_80g"][4].replace(",", ""))
    assert speed == pytest.approx(989.4 / 312, rel=1e-3)


def test_the_program_says_what_it_does_on_stderr(compose, tmp_path, capsys):
    plan.plan.__wrapped__.__wrapped__(compose([*WORDS, "ranks=[1]"], tmp_path, "plan"))
    out, err = capsys.readouterr()
    assert err == "plans 1 rank …\n"
    assert "plans" not in out


def test_several_ways_out_are_told_with_their_hours(printed):
    words = ["ranks=[2]", "trainer=fsdp_sim", "samples=64000"]
    lines = printed(*words, "headroom=0.0", "device.memory_gib=0.008")
    ways = [line for line in lines if line.endswith(", fits")]
    first, second, third = (line.partition(":")[0].strip() for line in ways)
    assert (first, second) == ("tuning.checkpointing=[llm]", "data.batch_size=1")
    assert third.endswith("ranks=4")
    assert all(re.search(r"GiB, .* s a step, .* GPU-hours, .*, fits", line) for line in ways)


@pytest.mark.slow
def test_advice_is_planned_one_change_on_the_other(printed):
    lines = printed("ranks=[2]", "trainer=ddp_sim", "device.memory_gib=0.004", "headroom=0.0")
    advice = [line for line in lines if re.match(r"  \S+=.* a step", line)]
    assert "trainer=fsdp" in advice[-1]
    assert "data.batch_size=1" in advice[-1]
    words = [set(line.split(":")[0].split()) for line in advice]
    keys = [{word.partition("=")[0] for word in line} for line in words]
    assert all(before <= after for before, after in pairwise(keys)), (
        "each line adds to the changes before it"
    )
    sizes = [float(line.split(": ")[1].split()[0]) for line in advice]
    assert sizes == sorted(set(sizes), reverse=True)


def test_worlds_none_of_which_can_be_are_an_error(printed):
    with pytest.raises(ValueError, match=r"none of ranks=\[3, 5\]"):
        printed("ranks=[3,5]")


def test_ranks_are_given_as_for_a_sweep(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ropelab-plan", "ranks=8,64", "mfu=0.3"])
    monkeypatch.setattr(plan, "plan", lambda: None)
    plan.main()
    assert sys.argv[1:] == ["ranks=[8,64]", "mfu=0.3"]
    monkeypatch.setattr("sys.argv", ["ropelab-plan", "device=all"])
    plan.main()
    assert sys.argv[1:] == ["every_device=true"]
