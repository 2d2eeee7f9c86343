"""Sharded weights are saved, resumed, used and evaluated as in a single process."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.reporting.data import load_run
from experiments.run.compose import plain
from lightning_modules.checkpoint.weights import read_checkpoint, sha256
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.tiny_fit import (
    MODEL,
    OPTIM,
    TUNED,
    build_network,
    check_program,
    make_batch,
    make_fit,
    whole,
)


@pytest.fixture(scope="module")
def fit(compose, tiny):
    return make_fit(compose, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sharded_checkpoint_of_two_ranks_is_resumed_by_any_number(
    world, fit, run_ranks, tmp_path_factory, tmp_path
):
    """From the end of an epoch. The checkpoint has moments and the step count as well."""
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


def test_a_sharded_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    torch.save({"stages": {}}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"io\.open, which is not allowed"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "opened").exists()


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
    assert lengths[0] < lengths[1], "the first rank must end early"


def test_a_sharded_run_is_trained_tested_and_evaluated(tiny, compose, run_ranks, tmp_path):
    words = [*tiny, "logger=csv", "trainer=fsdp_sim", "data.batch_size=2"]
    check_program(words, compose, run_ranks, tmp_path)


@pytest.mark.slow
def test_the_programs_start_their_ranks_and_one_process_finds_the_same(tiny, tmp_path):
    def program(name, *words):
        command = [sys.executable, "-m", f"experiments.{name}", *words, "logger=csv"]
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    program("train", *tiny, "trainer=fsdp_sim", "data.batch_size=2", "hydra.run.dir=run")
    program("evaluate", "run=run", "hydra.run.dir=two")
    program("evaluate", "run=run", "hydra.run.dir=one", "trainer=cpu")
    run, two, one = (load_run(tmp_path / name).needle.cells for name in ("run", "two", "one"))
    assert run == two
    assert [c.correct for c in run["plain"]] == [c.correct for c in one["plain"]]
