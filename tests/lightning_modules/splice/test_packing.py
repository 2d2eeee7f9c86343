"""Samples that share a row of the LLM give the same numbers as alone, for every scheme."""

import csv
from collections import defaultdict
from functools import partial
from itertools import pairwise

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from datamodules.batch import IGNORE_INDEX
from lightning_modules.distributed.sharding import shard
from lightning_modules.loss import sequence_log_probs
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.splice.packing import one_a_row, pack
from tests.lightning_modules.test_model import COUNTS, MIXED, ROTARY, S, make_batch, rows_of, specs

#: More text around the visuals of MIXED, for rows of several lengths.
SAMPLES = [*MIXED, [16, 17], [18, 19, S, 20, 21, 22, 23, 24], [25] * 15]
VISUALS = [*COUNTS, 3]
PACKING = 34


def make_model(attention="sdpa", dtype=torch.float32, **options):
    torch.manual_seed(0)
    spec = specs(pooler="prompt_guided", **options)
    if spec["rotary"].get("temporal_spacing"):
        spec["rotary"]["temporal_spacing"] = 0.75  # positions that are fractions
    spec["llm"]["attention"] = attention
    return VideoLanguageModel(VideoLanguageModelConfig(**spec)).to(dtype)


def batch_of_samples():
    batch = make_batch(SAMPLES, VISUALS)
    batch.labels[:, 0] = batch.input_ids[:, 0].clamp(min=0)  # no other sample may learn to say it
    return batch


def read(model, batch, packing=None):
    """Returns hidden states by sample, the loss, and its gradients by name."""
    model.zero_grad()
    output = model(batch, packing=packing)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    hidden = [output.hidden[row, start:stop] for row, start, stop in output.inputs.samples]
    return hidden, output, gradients


def read_alone(model, batch):
    """Returns the same from one forward per sample."""
    hidden, total, count = [], 0, 0
    model.zero_grad()
    for row in rows_of(batch):
        output = model(row)
        hidden.append(output.hidden[0])
        total = total + output.loss * output.labelled
        count += int(output.labelled)
    (total / count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden, total / count, gradients


def assert_alike(found, expected, share=2e-5):
    """Equal within a share of the largest number."""
    assert found.keys() == expected.keys() if isinstance(found, dict) else True
    keys = found if isinstance(found, dict) else range(len(found))
    for key in keys:
        scale = expected[key].abs().max().item()
        assert (found[key] - expected[key]).abs().max().item() <= share * scale + 1e-6, key


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rotary", ROTARY)
def test_packed_equals_separate(rotary, attention):
    # In float64, because float32 rounds some gradients by 3e-5 of the largest.
    model = make_model(rotary=rotary, attention=attention, dtype=torch.float64)
    batch = batch_of_samples()
    hidden, output, gradients = read(model, batch, PACKING)
    rows = output.inputs.embeds.shape[0]
    assert 1 < rows < len(batch)
    assert not output.inputs.mask.all(), "padding is part of the test"
    alone, loss, expected = read_alone(model, batch)
    assert_alike(hidden, alone, 2e-6)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-6)
    assert len(gradients) > 50
    assert_alike(gradients, expected, 2e-6)


@pytest.mark.parametrize("rotary", ROTARY)
@torch.no_grad()
def test_flex_attention_sees_the_same_documents_and_padding(rotary, uncompiled_flex):
    model, batch = make_model(rotary=rotary).eval(), batch_of_samples()
    flex = make_model("flex_attention", rotary=rotary).eval()
    for packing in (PACKING, None):
        expected, found = (network(batch, packing=packing) for network in (model, flex))
        mask = found.inputs.mask
        assert not mask.all(), "padding is part of the test"
        assert not torch.equal(found.hidden[mask], expected.hidden[mask]), (
            "packing must compute in another order"
        )
        assert_alike([found.hidden[mask]], [expected.hidden[mask]])


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_compiled_gives_the_same():
    """Rows have two lengths, so code that was compiled for one also serves the other."""
    model, flex = make_model().eval(), make_model("flex_attention").eval()
    for batch in (batch_of_samples(), batch_of_samples().select([0, 1])):
        for packing in (PACKING, None):
            expected, found = (network(batch, packing=packing) for network in (model, flex))
            mask = found.inputs.mask
            assert_alike([found.hidden[mask]], [expected.hidden[mask]])


def test_one_sample_a_row_is_what_it_was():
    """Without packing there is a mask, and a row is a sample."""
    model, batch = make_model().eval(), batch_of_samples()
    hidden, output, _ = read(model, batch)
    assert [span.row for span in output.inputs.samples] == list(range(len(batch)))
    assert output.inputs.attention_mask is output.inputs.mask
    assert_alike(hidden, read_alone(model, batch)[0])


def test_a_sample_longer_than_the_row_is_taken_whole():
    model, batch = make_model(), batch_of_samples()
    hidden, output, _ = read(model, batch, 8)
    longest = max(stop - start for _, start, stop in output.inputs.samples)
    assert output.inputs.embeds.shape[1] == longest > 8
    assert output.inputs.embeds.shape[0] < len(batch)  # the others share rows of that length
    assert_alike(hidden, read_alone(model, batch)[0])


@torch.no_grad()
def test_the_test_would_see_samples_that_meet():
    """Without any of the parts that separate samples, hidden states change by far more."""
    model, batch = make_model(), batch_of_samples()
    inputs = model(batch, packing=PACKING).inputs
    alone = [model(row).hidden[0] for row in rows_of(batch)]

    def worst(mask, positions):
        hidden = model.llm(inputs.embeds, mask, positions)
        return max(
            (hidden[row, start:stop] - expected).abs().max().item()
            for (row, start, stop), expected in zip(inputs.samples, alone, strict=True)
        )

    running = inputs.positions.clone()
    running[0] = torch.arange(running.shape[-1]).float()
    assert worst(None, inputs.positions) < 5e-5
    assert worst(None, running) > 1e-2
    assert worst(inputs.mask, inputs.positions) > 1e-2


@torch.no_grad()
def test_no_sample_learns_to_say_the_first_word_of_the_next():
    model, batch = make_model(), batch_of_samples()
    inputs = model(batch, packing=PACKING).inputs
    starts = [inputs.labels[row, start].item() for row, start, _ in inputs.samples]
    assert starts == [IGNORE_INDEX] * len(batch)
    learnt = [
        inputs.labels[row, a:b][inputs.labels[row, a:b] != IGNORE_INDEX].tolist()
        for row, a, b in inputs.samples
    ]
    assert learnt == [row[-2:][len(row) == 2 :] for row in SAMPLES]
    # With those labels left in, the loss changes.
    left = inputs.labels.clone()
    for row, start, _ in inputs.samples:
        left[row, start] = 7
    hidden = model.llm(inputs.embeds, inputs.attention_mask, inputs.positions)
    losses = [
        sequence_log_probs(hidden, labels, model.llm.head)[0] for labels in (inputs.labels, left)
    ]
    assert abs((losses[0] - losses[1]).sum()) > 1e-2


@torch.no_grad()
def test_packed_equals_separate_in_bfloat16():
    """Positions stay exact in it, so packing adds no error to that of the weights."""
    model, batch = make_model(dtype=torch.bfloat16), batch_of_samples()
    output = model(batch, packing=PACKING)
    for (row, start, stop), single in zip(output.inputs.samples, rows_of(batch), strict=True):
        alone = model(single).hidden[0].float()
        packed = output.hidden[row, start:stop].float()
        assert (packed - alone).norm() < 2e-2 * alone.norm()


def reference_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """Computes the result of the CUDA kernel (tokens heads width), document by document."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert int(cu_seqlens_q.diff().max()) == int(max_seqlen_q) == int(max_seqlen_k)
    assert options["causal"]
    bounds = cu_seqlens_q.tolist()
    parts = []
    for start, stop in pairwise(bounds):
        rows = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


@torch.no_grad()
def test_flash_attention_is_told_of_every_document(monkeypatch):
    """Several packed rows in transformers' call of the flash kernel, which is a CPU one here."""

    def refuse(*args, **kwargs):
        raise AssertionError("attention over whole rows")

    kernels = (refuse, reference_varlen, refuse, refuse, refuse)
    options = defaultdict(bool, max_seqlen_q=True, max_seqlen_k=True)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=options)
    found = kernels, (process, process)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: found)
    model, batch = make_model(), batch_of_samples()
    alone = [model(row).hidden[0] for row in rows_of(batch)]
    model.llm.lm.config._attn_implementation = "flash_attention_2"
    output = model(batch, packing=PACKING)
    assert output.inputs.embeds.shape[0] > 1
    assert_alike([output.hidden[row, a:b] for row, a, b in output.inputs.samples], alone)


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sample_once_and_no_two_rows_fit_in_one(seed):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (int(torch.randint(1, 60, (1,), generator=rng)),), generator=rng)
    lengths, most = lengths.tolist(), 64
    placement = pack(lengths, most)
    assert [span.stop - span.start for span in placement.spans] == lengths
    taken = torch.zeros(placement.rows, placement.width, dtype=torch.int)
    for row, start, stop in placement.spans:
        taken[row, start:stop] += 1
    assert taken.max() == 1
    assert placement.width <= max(most, *lengths)
    used = taken.sum(1).tolist()
    full = max(most, *lengths)
    assert all(a + b > full for i, a in enumerate(used) for b in used[:i])
    assert pack(lengths, most) == placement


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_a_row(side):
    placement = one_a_row([2, 3], side)
    rows = placement.spread(torch.tensor([1, 2, 3, 4, 5]), fill=-1)
    left = [[-1, 1, 2], [3, 4, 5]]
    assert rows.tolist() == (left if side == "left" else [[1, 2, -1], [3, 4, 5]])


def gradients_of_rank(batches, packing, rank):
    """One FSDP2 step of two ranks whose batches fill different numbers of rows."""
    torch.distributed.init_process_group("gloo")
    model = make_model()
    axes = ("data_parallel", "tensor_parallel")
    shard(model, model.blocks(), init_device_mesh("cpu", (2, 1), mesh_dim_names=axes))
    ran = [0] * len(model.blocks())
    for number, block in enumerate(model.blocks()):
        block.register_forward_hook(lambda *_, n=number: ran.__setitem__(n, ran[n] + 1))
    output = model(batches[rank], packing=packing)
    output.loss.backward()
    found = {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }
    return output.inputs.embeds.shape[0], ran, found


def test_ranks_that_pack_differently_take_one_step_together(run_ranks):
    """FSDP2 gathers block by block, so each block runs once on every rank, even for only text."""
    batches = [batch_of_samples(), make_batch([[1, 2, 3], [4, 5, 6, 7], [8, 9, 10]], [])]
    work = partial(gradients_of_rank, batches, PACKING)
    (rows, ran, found), (other_rows, other_ran, _) = run_ranks(2, work)
    assert (rows > 1, other_rows) == (True, 1)
    assert ran == other_ran == [1] * len(ran)
    model = make_model()
    expected = [read(model, batch)[2] for batch in batches]
    mean = {
        name: sum(grads.get(name, torch.zeros_like(p)) for grads in expected) / 2
        for name, p in model.named_parameters()
        if name in found
    }
    assert_alike(found, mean)


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return {name: [float(row[name]) for row in rows] for name in ("train/loss", "train/padding")}


def test_a_training_packs_by_one_word(run_train, tmp_path):
    for name, words in {"rows": [], "packed": ["module.packing=256"]}.items():
        run_train(tmp_path / name, "test=false", "data.training.samples=8", *words)
    rows, packed = metrics(tmp_path / "rows"), metrics(tmp_path / "packed")
    torch.testing.assert_close(packed["train/loss"], rows["train/loss"], atol=1e-4, rtol=1e-4)
    assert len(packed["train/loss"]) == 2
    assert min(packed["train/padding"]) >= 0
    assert sum(packed["train/padding"]) < sum(rows["train/padding"])


def test_packing_that_makes_no_sense_is_refused(run_train, tmp_path):
    with pytest.raises((SystemExit, ValueError), match=r"module\.packing is 0; set a number"):
        run_train(tmp_path, "module.packing=0")
