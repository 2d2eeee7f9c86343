"""Every precision trains LoRA and clips. Angles stay in float32."""

from functools import partial

import pytest
import torch
from torch.nn.utils import get_total_norm

from lightning_modules.lora import is_lora
from lightning_modules.training.instruct import VideoLLMModule
from lightning_modules.training.tuning import Tuning
from tests.helpers.finite import all_finite
from tests.helpers.tiny_fit import Angles
from tests.helpers.tuned import LORA, make_module, train
from tests.lightning_modules.test_model import specs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_precision_trains_and_clips_with_float32_angles(precision):
    """LoRA has the dtype that the trainer keeps weights in. The fused optimizer clips in each."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module, angles = make_module(Tuning(lora=LORA), optimizer), Angles()
    train(module, 2, precision=precision, gradient_clip_val=0.1, callbacks=[angles])
    kept = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {kept}
    assert angles.worst == 0
    assert all_finite(module)


def test_mixed_precision_clips_by_the_norm():
    optimizer = partial(torch.optim.SGD, lr=1.0, fused=True)
    module = make_module(Tuning(freeze=["encoder", "llm"]), optimizer)
    before = [p.detach().clone() for p in module.network.projector.parameters()]
    train(module, 1, precision="bf16-mixed", gradient_clip_val=0.1)
    step = [a - b for a, b in zip(module.network.projector.parameters(), before, strict=True)]
    assert get_total_norm(step) == pytest.approx(0.1, rel=1e-4)


def test_lora_is_float32_beside_a_base_in_bfloat16(tmp_path):
    """As with model.llm.dtype=bfloat16 and trainer.precision=bf16-mixed."""
    make_module().network.llm.lm.save_pretrained(tmp_path)
    spec = specs()
    spec["llm"] = {
        "source": str(tmp_path),
        "dtype": "bfloat16",
        "_target_": spec["llm"]["_target_"],
    }
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module = VideoLLMModule(spec, optimizer, tuning=Tuning(lora=LORA))
    assert all(part.training for part in module.network.modules()), "else nothing is recomputed"
    train(module, 2, precision="bf16-mixed")
    dtypes = {is_lora(n): p.dtype for n, p in module.network.llm.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(p.any() for n, p in module.network.named_parameters() if "lora_B" in n)
