"""Recall at k, from captions to visuals and back, over batches and ranks."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torchmetrics.retrieval import RetrievalRecall

from lightning_modules.metrics.retrieval import Retrieval


def random_pairs(count, seed=0, noise=3.0):
    rng = torch.Generator().manual_seed(seed)
    visuals = torch.randn(count, 16, generator=rng)
    captions = visuals + noise * torch.randn(count, 16, generator=rng)
    return normalize(visuals, dim=-1), normalize(captions, dim=-1)


def retrieve(visuals, captions, size, keys=None, metric=None):
    metric = metric or Retrieval()
    keys = keys or [f"{n}" for n in range(len(visuals))]
    for at in range(0, len(visuals), size):
        part = slice(at, at + size)
        metric.update(visuals[part], captions[part], keys[part], torch.tensor([10.0]))
    return {name: score.item() for name, score in metric.compute().items()}


def test_recall_is_that_of_torchmetrics():
    visuals, captions = random_pairs(40)
    scores = retrieve(visuals, captions, 7)
    rows = torch.arange(40)[:, None].expand(40, 40)
    for name, similar in (("t2i", captions @ visuals.T), ("i2t", visuals @ captions.T)):
        for rank in (1, 5, 10):
            recall = RetrievalRecall(top_k=rank)
            expected = recall(similar.flatten(), (rows == rows.T).flatten(), rows.flatten())
            assert scores[f"{name}_r{rank}"] == pytest.approx(expected.item())
    assert 0.1 < scores["t2i_r1"] < scores["t2i_r5"] < scores["t2i_r10"] < 1


def test_recall_does_not_depend_on_batches_or_repetition():
    visuals, captions = random_pairs(40)
    whole = retrieve(visuals, captions, 40)
    assert retrieve(visuals, captions, 1) == pytest.approx(whole)
    again = torch.cat([visuals, visuals[:9]]), torch.cat([captions, captions[:9]])
    keys = [f"{n % 40}" for n in range(49)]
    assert retrieve(*again, 12, keys) == pytest.approx(whole)


def test_ranks_with_other_numbers_of_pairs_find_what_one_finds(run_ranks):
    visuals, captions = random_pairs(40)
    whole = retrieve(visuals, captions, 40)

    def run(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        mine = slice(0, 25) if rank else slice(20, 40)  # five of them on both
        keys = [f"{n}" for n in range(40)][mine]
        return retrieve(visuals[mine], captions[mine], 10, keys)

    for scores in run_ranks(2, run):
        assert scores == pytest.approx(whole)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_model_finds_nothing(value):
    same = torch.full((30, 16), value)
    scores = retrieve(same, same, 30)
    assert {scores[f"t2i_r{rank}"] for rank in (1, 5, 10)} == {0.0}
