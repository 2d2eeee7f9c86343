"""A stage of training starts from the one before it: the weights that it takes, and new ones."""

import pytest
import torch
from omegaconf import DictConfig, open_dict

from experiments.run.compose import build, plain
from lightning_modules.checkpoint.weights import read_checkpoint

TUNINGS = [f"ppllava_vicuna7b_{data}" for data in ("video", "image_video", "multi_image")]

CLIP, TUNING, DPO = "clip_context", TUNINGS[0], "ppllava_dpo"
OTHER = "videorope_qwen2_7b"
SCALES = ["full", pytest.param("tiny", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def stage(compose, tmp_path_factory):
    """`stage(recipe, init, *words)` returns its module, with sizes instead of sources."""
    folder = tmp_path_factory.mktemp("composed")

    def make(recipe, init=None, *overrides):
        config = compose([f"experiment={recipe}", *overrides], folder, "plan")
        config.init = None if init is None else str(init)
        with open_dict(config):
            for spec in config.model.values():
                if isinstance(spec, DictConfig) and spec.get("source"):
                    spec.source, spec.config = None, config.sizes[spec.source]
        return build(config.module, "module")(model=plain(config.model))

    return make


@pytest.fixture(scope="module")
def left(stage, tmp_path_factory):
    """`left(recipe)` returns the run directory that it would leave. 7B weights have no values."""
    folders = {}

    def make(recipe, *overrides):
        if (recipe, overrides) not in folders:
            module = stage(recipe, None, *overrides)
            with torch.device("cpu" if "scale=tiny" in overrides else "meta"):
                module.model = module.build()
            folders[recipe, overrides] = save(module, tmp_path_factory.mktemp(recipe))
        return folders[recipe, overrides]

    return make


def save(module, folder):
    checkpoint = {"state_dict": {f"model.{n}": v for n, v in module.network.state_dict().items()}}
    module.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir()
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize("scale", SCALES)
def test_each_recipe_starts_from_the_one_before_without_a_word(scale, stage, left):
    scaled = f"scale={scale}"
    stage(TUNING, left(CLIP, scaled), scaled).check()
    stage(DPO, left(TUNING, scaled), scaled).check()


@pytest.mark.parametrize("scale", SCALES)
def test_the_three_tunings_are_one_model_and_allow_the_same(scale, compose, tmp_path):
    words = [[f"experiment={name}", f"scale={scale}"] for name in TUNINGS]
    configs = [compose(each, tmp_path) for each in words]
    for key in ("model", "init_allow"):
        first, *others = (plain(config[key]) for config in configs)
        assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ([CLIP], DPO, r"parameters of the model are not in it"),
        ([TUNING], CLIP, r"keys have no place"),
        ([CLIP, "model.encoder.context_length=null"], TUNING, "keys"),
        ([CLIP, "model.encoder.config.projection_dim=16"], TUNING, "shape"),
        ([OTHER, "rotary=vanilla"], TUNING, "keys have no place"),
        ([TUNING, "encoder=clip_tiny"], DPO, "keys|not in"),
    ],
)
def test_a_wrong_start_is_refused(before, after, says, stage, left):
    with pytest.raises(ValueError, match=says) as caught:
        stage(after, left(*before, "scale=tiny"), "scale=tiny").check()
    assert "\n" not in str(caught.value)


def test_tuning_starts_with_the_encoder_of_post_training(stage, tmp_path):
    """BT-Adapter, which that stage lacks, starts as a copy of the layers that it has trained."""
    torch.manual_seed(1)
    folder = save(stage(CLIP, None, "scale=tiny"), tmp_path)
    stored = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    torch.manual_seed(2)
    filled = stage(TUNING, folder, "scale=tiny").network.state_dict()
    kept = [n for n in filled if n.startswith("encoder.") and not n.startswith("encoder.adapter.")]
    assert kept
    for name in kept:
        assert torch.equal(filled[name], stored[f"model.{name}"]), name
    copied = [name for name in filled if name.startswith("encoder.adapter.spatial.0.")]
    assert len(copied) == 16
    for name in copied:
        trunk = name.replace("encoder.adapter.spatial.0", "model.encoder.vision.encoder.layers.1")
        assert torch.equal(filled[name], stored[trunk]), name


@pytest.mark.slow
def test_preference_tuning_and_its_reference_start_as_tuning_has_ended(stage, tmp_path):
    torch.manual_seed(1)
    folder = save(stage(TUNING, None, "scale=tiny"), tmp_path)
    stored = read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    torch.manual_seed(2)
    module = stage(DPO, folder, "scale=tiny")
    module.configure_model()
    for network in (module.network, module.reference.network):
        state = {f"model.{name}": value for name, value in network.state_dict().items()}
        torch.testing.assert_close(state, stored, atol=0, rtol=0)
