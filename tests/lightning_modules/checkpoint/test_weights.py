"""One reader of weights: equal tensors from every form in which a network is saved."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.checkpoint.weights import open_saved, read_checkpoint

WEIGHTS = {"encoder.a": torch.arange(4.0), "projector.b": torch.ones(2, 3)}
SPECS = {"rotary": {"_target_": "lightning_modules.rotary.vanilla.VanillaRope"}}


@pytest.fixture
def run(tmp_path):
    """A run directory with one checkpoint. `loss.c` is a parameter outside of the network."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    state = {f"model.{name}": value for name, value in WEIGHTS.items()}
    held = {"state_dict": state | {"loss.c": torch.ones(1)}, "stages": SPECS, "global_step": 7}
    torch.save(held, folder / "last.ckpt")
    return folder.parent


@pytest.fixture
def exported(tmp_path):
    """A folder as `save_pretrained` writes it."""
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "ropelab", **SPECS}))
    return folder


@pytest.mark.parametrize("form", ["run", "checkpoint", "named", "exported"])
def test_every_form_gives_the_same_tensors_and_specs(form, run, exported):
    last = run / "checkpoints" / "last.ckpt"
    place, name = {
        "run": (run, None),
        "checkpoint": (last, None),
        "named": (run, "last.ckpt"),
        "exported": (exported, None),
    }[form]
    saved = open_saved(place, "init", name)
    assert saved.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(saved.weights[key], value) for key, value in WEIGHTS.items())
    assert saved.specs["rotary"] == SPECS["rotary"]
    assert saved.checkpoint.get("global_step") == (None if form == "exported" else 7)
    assert saved.path == (exported if form == "exported" else last)


def test_resuming_reads_the_same_but_keeps_no_file_open(run):
    """The file is replaced while the run continues, and a network file system would lose it."""
    last = run / "checkpoints" / "last.ckpt"
    mapped, read = (read_checkpoint(last, mmap=mmap)["state_dict"] for mmap in (True, False))
    size = last.stat().st_size
    with last.open("r+b") as file:
        file.write(bytes(size))
    assert torch.equal(read["model.encoder.a"], WEIGHTS["encoder.a"])
    assert not torch.equal(mapped["model.encoder.a"], WEIGHTS["encoder.a"])


@pytest.mark.parametrize("key", ["init", "run"])
def test_mistakes_name_the_setting(key, run, tmp_path):
    def says(words: str, *place) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            open_saved(place[0], key, *place[1:])
        assert "\n" not in str(caught.value)

    says(f"{key}=.*nowhere does not exist: set {key} to", tmp_path / "nowhere")
    says(f"no checkpoint in .*: set {key}= to a run directory", tmp_path)
    says(f"no checkpoint best.ckpt in .*: set {key}= to", run, "best.ckpt")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-50])
    says(f"{key}=.*last.ckpt is truncated", run, "last.ckpt")
    says("no checkpoint in .* is complete", run)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    says(f"{key}=.* holds a model of type 'qwen2': convert it with ropelab-import", tmp_path)
