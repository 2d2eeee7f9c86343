"""The weighted 3-D pooling and the stretched context equal PPLLaVA's own."""

import pytest
import torch

from datamodules.batch import Grid
from lightning_modules.encoder.prompt import stretch_positions
from lightning_modules.pooler.prompt_guided import PromptGuidedPooler
from lightning_modules.tokens import VisualTokens


def test_pooling(pooling_golden):
    if "pool" not in pooling_golden.spec:
        pytest.skip("no pooling case in this pair")
    for i, case in enumerate(pooling_golden.spec["pool"]):
        x, weights, y = (
            pooling_golden.tensors[f"pool{i}/{name}"] for name in ("x", "weights", "y")
        )
        pooler = PromptGuidedPooler(
            kernel=case["kernel"],
            stride=case["stride"],
            output_size=case["output_size"],
            image_kernel=case["kernel"],
            crop=True,
            temperature=case["temperature"],
            logit_scale=0.0,  # so the weights enter the last softmax unchanged
        )
        assert list(y.shape) == case["y_shape"]
        assert pooler.extent(Grid(*x.shape[2:])) == tuple(y.shape[2:])
        for sample, weight, expected in zip(x, weights, y, strict=True):
            tokens = VisualTokens.on_grid(sample.permute(1, 2, 3, 0))
            ours = pooler(tokens, weight.flatten()).as_grid().permute(3, 0, 1, 2)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_context_extension(pooling_golden):
    if "context_extension" not in pooling_golden.spec:
        pytest.skip("no context in this pair")
    case = pooling_golden.spec["context_extension"]
    before = pooling_golden.tensors[f"context/positions_{case['from']}"]
    after = pooling_golden.tensors[f"context/positions_{case['to']}"]
    assert (
        case["kept_positions"] + case["factor"] * (case["from"] - case["kept_positions"])
        == case["to"]
    )
    ours = stretch_positions(before, case["to"], case["kept_positions"])
    torch.testing.assert_close(ours, after, atol=1e-6, rtol=0)
