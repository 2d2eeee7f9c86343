"""Every attention gives the same, and one that is not available is refused in one line."""

import pytest
import torch

from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.tuning import Tuning
from tests.helpers.tuned import hidden, make_module, train
from tests.lightning_modules.test_model import specs


@pytest.mark.parametrize("stage", ["llm", "encoder"])
@pytest.mark.parametrize(
    ("word", "says"), [("sdpaa", "not supported"), ("flash_attention_3", "installed")]
)
def test_an_attention_that_is_not_there_is_one_line(stage, word, says):
    spec = specs()
    spec[stage] = spec[stage] | {"attention": word}
    with pytest.raises(ValueError, match=rf"model\.{stage}\.attention={word} .*{says}") as caught:
        VideoLanguageModel(VideoLanguageModelConfig(**spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["llm", "encoder"])
def test_every_attention_gives_the_same(stage, tmp_path):
    base = make_module().network
    spec = specs()
    spec[stage] = spec[stage] | {"attention": "eager"}
    eager = VideoLanguageModel(VideoLanguageModelConfig(**spec))
    eager.load_state_dict(base.state_dict())
    eager.save_pretrained(tmp_path)
    again = VideoLanguageModel.from_pretrained(tmp_path)
    for network in (eager, again):
        config = network.llm.lm.config if stage == "llm" else network.encoder.vision.config
        assert config._attn_implementation == "eager"
        torch.testing.assert_close(hidden(network), hidden(base), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["llm", "encoder"])
def test_training_with_flex_attention_on_a_cpu_is_refused_in_one_line(stage):
    module = make_module()
    module.spec[stage]["attention"] = "flex_attention"
    line = rf"model\.{stage}\.attention=flex_attention has no backward on a CPU: set .*=sdpa"
    with pytest.raises(ValueError, match=line) as caught:
        train(module, 1)
    assert "\n" not in str(caught.value)


def test_a_frozen_encoder_may_have_flex_attention_on_a_cpu(uncompiled_flex):
    module = make_module(Tuning(freeze=["encoder"]), pooler="average")
    module.spec["encoder"]["attention"] = "flex_attention"
    train(module, 1)
    assert module.network.encoder.vision.config._attn_implementation == "flex_attention"
