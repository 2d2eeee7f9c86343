"""ropelab-export --layout qwen2_vl: transformers' own class opens it and computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from datamodules.batch import Visual
from experiments import export, import_weights
from experiments.evaluate import load as load_run
from lightning_modules.encoder.native.patches import PatchSizes, Steps, cut_patches
from lightning_modules.importers import write_qwen2_vl
from tests.experiments.test_export import leave_run
from tests.parity.conftest import load

GOLDEN = Path(__file__).parents[1] / "golden" / "videorope"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Returns a function: the folder of the published checkpoint under a scheme."""
    folder = tmp_path_factory.mktemp("imported")

    def make(word):
        out = folder / word
        if not out.exists():
            words = [str(GOLDEN / "ckpt"), str(out), "--rotary", word]
            assert import_weights.main(words) == 0
        return out

    return make


def written(source, out, *words):
    export.main([str(source), str(out), "--layout", "qwen2_vl", *words])
    return out


def open_there(folder):
    model, report = Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def test_a_round_trip_gives_equal_bits(imported, tmp_path):
    out = written(imported("mrope"), tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (GOLDEN / "ckpt", out))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name])
    # And once more from there.
    words = [str(out), str(tmp_path / "again"), "--rotary", "mrope"]
    assert import_weights.main(words) == 0
    first, second = (
        load_file(f / "model.safetensors") for f in (imported("mrope"), tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_config_says_what_the_published_one_says(imported, tmp_path):
    """It is flat, as transformers 4.45 reads it; defaults are written, too."""
    out = written(imported("mrope"), tmp_path / "out")
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, GOLDEN / "ckpt"))
    vision = theirs.pop("vision_config")
    assert ours["vision_config"].items() >= vision.items()
    rope = theirs.pop("rope_scaling")
    assert ours["rope_scaling"] == {"type": "mrope", "mrope_section": rope["mrope_section"]}
    for name in ("transformers_version", "sliding_window"):  # 4.45: a window that is not used
        theirs.pop(name)
    assert ours.items() >= theirs.items()
    configs = [
        Qwen2VLForConditionalGeneration.config_class.from_pretrained(f).to_dict()
        for f in (out, GOLDEN / "ckpt")
    ]
    for config in configs:
        config["text_config"]["rope_parameters"].pop("type", None)
        config.pop("transformers_version")
    assert configs[0] == configs[1]


def pixels_of(golden, case):
    """Returns the arguments of transformers' class for the visuals of a case."""
    options = {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        visuals = [golden.spec["visuals"][name] | {"name": name} for name in case[f"{kind}s"]]
        if not visuals:
            continue
        patches = [
            cut_patches(
                golden.tensors[f"visuals/{visual['name']}/resized"],
                Steps(0, 0, visual["llm_grid"][0]),
                PatchSizes(frames=2, side=14, merge=2),
            )
            for visual in visuals
        ]
        options[f"pixel_values{suffix}"] = torch.cat(patches)
        options[f"{kind}_grid_thw"] = torch.tensor([visual["grid_thw"] for visual in visuals])
    return options


@torch.no_grad()
def test_transformers_opens_it_and_gives_the_published_logits(imported, tmp_path):
    """Positions are given: transformers 5.23 computes others itself, see the README of golden."""
    golden = load(GOLDEN / "public.json")
    theirs = open_there(written(imported("mrope"), tmp_path / "out", "--dtype", "float32"))
    for number in (0, 1, 2, 4):
        names = ("input_ids", "attention_mask", "m_rope/position_ids", "m_rope/logits")
        ids, mask, positions, logits = (golden.tensors[f"case{number}/{name}"] for name in names)
        pixels = pixels_of(golden, golden.spec["cases"][number])
        found = theirs(ids, attention_mask=mask, position_ids=positions.long(), **pixels).logits
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


def test_the_image_processor_gets_the_sizes_of_the_tower(imported, tmp_path):
    out = written(imported("mrope"), tmp_path / "out")
    ours, theirs = (
        json.loads((f / "preprocessor_config.json").read_text()) for f in (out, GOLDEN / "ckpt")
    )
    assert ours.items() <= theirs.items()


def test_m_rope_by_the_settings_of_videorope_is_written(imported, tmp_path):
    folder = shutil.copytree(imported("videorope"), tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    off = {"low_frequency_temporal": False, "diagonal_layout": False, "temporal_spacing": 1.0}
    config["rotary"] |= off
    (folder / "config.json").write_text(json.dumps(config))
    out = written(folder, tmp_path / "out")
    sections = json.loads((out / "config.json").read_text())["rope_scaling"]["mrope_section"]
    assert sections == [4, 6, 6]


@pytest.mark.parametrize(
    ("word", "name"), [("videorope", "VideoRope"), ("tad", "TadRope"), ("vanilla", "VanillaRope")]
)
def test_schemes_that_transformers_cannot_express(word, name, imported, tmp_path):
    """They are refused before weights are read."""
    folder = shutil.copytree(imported(word), tmp_path / "in")
    (folder / "model.safetensors").unlink()
    says = rf"cannot express the scheme {name} .*leave out --layout"
    with pytest.raises(SystemExit, match=says):
        written(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_other_components_that_it_cannot_express(imported, tmp_path):
    for part, target, name in (
        ("pooler", "pooler.average.AveragePooler", "the pooler AveragePooler"),
        ("encoder", "encoder.siglip.SiglipEncoder", "the encoder SiglipEncoder"),
    ):
        folder = shutil.copytree(imported("mrope"), tmp_path / part)
        config = json.loads((folder / "config.json").read_text())
        config[part] = {"_target_": f"lightning_modules.{target}"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(SystemExit, match=f"cannot express {name}"):
            written(folder, tmp_path / "out")
    with pytest.raises(SystemExit, match="no place for LoRA apart"):
        written(imported("mrope"), tmp_path / "out", "--lora", "apart")


def test_token_ids_outside_the_vocabulary(imported, tmp_path):
    folder = shutil.copytree(imported("mrope"), tmp_path / "in")
    (folder / "import.json").unlink()
    says = r"vision_start_token_id=151652 is not in the llm's vocabulary of 128.*<\|image_pad\|>"
    with pytest.raises(SystemExit, match=says):
        written(folder, tmp_path / "out")


def test_a_run_is_written_with_its_tokenizer(compose, tmp_path, monkeypatch):
    """Its embeddings are tied, and it was not trained from a published checkpoint."""
    words = ["encoder=qwen2_vl_tiny", "pooler=none", "rotary=mrope", "data.frames.image_size=64"]
    run = leave_run(compose([*words, "name=a", "run_name=b"], tmp_path / "run"), tmp_path / "run")
    with pytest.raises(SystemExit, match="vision_start_token_id=151652 is not in the llm's voc"):
        written(run, tmp_path / "out")
    ids = {name: 100 + number for number, name in enumerate(write_qwen2_vl.SPECIAL_TOKENS)}
    monkeypatch.setattr(write_qwen2_vl, "_PUBLISHED", ids)
    theirs = open_there(written(run, tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    ours, _ = load_run(run)
    state = theirs.state_dict()
    assert torch.equal(
        state["lm_head.weight"], ours.state_dict()["llm.lm.model.embed_tokens.weight"]
    )
    visual = Visual(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    patches = cut_patches(visual.frames, Steps(0, 0, 1), ours.encoder.cut)
    with torch.no_grad():
        found = theirs.model.visual(patches, torch.tensor([[1, 4, 6]])).pooler_output
        (tokens,) = ours.encoder([visual])
        expected = ours.projector.contract(ours.projector.expand(tokens.features))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
