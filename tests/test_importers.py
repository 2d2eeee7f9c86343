"""Published layouts, tiny and random: after the import the numbers are transformers' own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from datamodules.batch import VISUAL_SLOT, VideoBatch
from experiments import import_weights
from lightning_modules.importers.initial import Initial
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.mrope import MRope

GOLDEN = Path(__file__).parent / "golden" / "ppllava"
IMAGE = 49
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Names as `save_pretrained` of transformers 5.x writes them -> as others do.
LAYOUTS = {
    "written": lambda name: name,
    "hub": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "in_memory": lambda name: (
        name.removeprefix("language_model.")
        if "lm_head" in name
        else f"model.{name.replace('language_model.model.', 'language_model.')}"
    ),
}


def randomise(model):
    """Values large enough that a wrong one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def llava_next():
    config = LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
    )
    return randomise(LlavaNextForConditionalGeneration(config))


@pytest.fixture(scope="module")
def llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**TEXT, "model_type": "qwen2", "tie_word_embeddings": True},
        image_token_index=IMAGE,
        video_token_index=48,
    )
    return randomise(LlavaOnevisionForConditionalGeneration(config))


@pytest.fixture(scope="module")
def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        text_config={**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": rope},
        vision_start_token_id=3,
    )
    return randomise(Qwen2VLForConditionalGeneration(config))


def write(model, folder, layout="written"):
    model.save_pretrained(folder)
    rename(folder, LAYOUTS[layout])
    return folder


def rename(folder, function):
    path = folder / "model.safetensors"
    save_file({function(name): value for name, value in load_file(path).items()}, path)


def run(*words, capsys=None):
    code = import_weights.main([str(word) for word in words])
    error = capsys.readouterr().err if capsys else ""
    return code, error


def imported(source, out, *words):
    assert import_weights.main([str(source), str(out), *words]) == 0
    return VideoLanguageModel.from_pretrained(out).eval()


def make_batch(ids, frames, counts):
    ids = torch.tensor([ids])
    return VideoBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=ids,
        frames=frames,
        frame_counts=counts,
        prompt_ids=torch.zeros(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        keys=["one"],
    )


def pixels(count):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def assert_near(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def their_logits(model, before, visual, after):
    """transformers' LLM on text, what its projector made of a visual, and text."""
    embed = model.get_input_embeddings()
    parts = [embed(torch.tensor([before])), visual[None], embed(torch.tensor([after]))]
    hidden = model.model.language_model(inputs_embeds=torch.cat(parts, 1)).last_hidden_state
    return model.lm_head(hidden)


def their_patches(model, frames, layer):
    tower = model.model.vision_tower
    hidden = tower(frames, output_hidden_states=True).hidden_states[layer]
    return model.model.multi_modal_projector(hidden)


BEFORE, AFTER = [1, 5, 6], [7, 8, 9, 2]


@torch.no_grad()
def test_llava_next_gives_its_logits(llava_next, tmp_path):
    model = imported(write(llava_next, tmp_path / "in", "hub"), tmp_path / "out")
    ids = torch.tensor([[1, 5, 6, 7]])
    text = model(make_batch(ids[0].tolist(), pixels(0), []))
    assert_near(model.llm.head(text.hidden), llava_next(ids).logits)

    image = their_patches(llava_next, pixels(1), -2)[0, 1:]
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(1), [1]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_next, BEFORE, image, AFTER))
    assert model.config.tiles == {"newline": True}
    assert torch.equal(model.image_newline, llava_next.model.image_newline)


def test_a_prompt_guided_model_starts_from_llava_next_as_ppllava_does(llava_next, tmp_path):
    plain = imported(write(llava_next, tmp_path / "in"), tmp_path / "out")
    clip = {"vision": VISION, "text": TEXT, "projection_dim": 8}
    target = "lightning_modules.encoder.clip.ClipEncoder"
    guided = "lightning_modules.pooler.prompt_guided.PromptGuidedPooler"
    config = VideoLanguageModelConfig(
        encoder={"_target_": target, "config": clip},
        pooler={"_target_": guided, "kernel": [1, 2, 2]},
        rotary={"_target_": "lightning_modules.rotary.videorope.VideoRope", "sections": [2, 3, 3]},
        llm=plain.config.llm,
    )
    model = VideoLanguageModel(config)
    prompts = ["encoder.text.*", "encoder.text_projection.*", "encoder.visual_projection.*"]
    unused = ["image_newline"]  # of tiles, which this one does not have
    Initial(str(tmp_path / "out"), unused, [*prompts, "pooler.*"]).fill(model, {})
    state, stored = model.state_dict(), plain.state_dict()
    stored.pop(*unused)
    for name, value in stored.items():
        assert torch.equal(state[name], value), name


@torch.no_grad()
def test_llava_onevision_gives_its_logits(llava_onevision, tmp_path):
    model = imported(write(llava_onevision, tmp_path / "in", "hub"), tmp_path / "out")
    ids = torch.tensor([[1, 5, 6, 7]])
    text = model(make_batch(ids[0].tolist(), pixels(0), []))
    assert_near(model.llm.head(text.hidden), llava_onevision(ids).logits)

    image = their_patches(llava_onevision, pixels(1), -1)[0]
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(1), [1]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_onevision, BEFORE, image, AFTER))

    # A video but for the newline behind it: on an even grid the bilinear halving is ours.
    videos = llava_onevision.model.get_video_features(
        pixels(3)[None], vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    video = videos.pooler_output[0, :-1]
    assert len(video) == 3 * 2 * 2
    ours = model(make_batch([*BEFORE, VISUAL_SLOT, *AFTER], pixels(3), [3]))
    assert_near(model.llm.head(ours.hidden), their_logits(llava_onevision, BEFORE, video, AFTER))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_every_layout_is_the_same_model(family, request, tmp_path):
    theirs = request.getfixturevalue(family)
    states = []
    for layout in LAYOUTS:
        source = write(theirs, tmp_path / f"{layout}_in", layout)
        stored = load_file(source / "model.safetensors")
        states.append(imported(source, tmp_path / layout).state_dict())
        report = json.loads((tmp_path / layout / "import.json").read_text())
        left = report["unused_on_purpose"]
        assert {*report["used"], *left} == set(stored)
        dropped = {name for name in left if "image_newline" not in name}
        assert all(".layers.2." in name for name in dropped)
        assert bool(dropped) == (family == "llava_next"), "its features come before the last layer"
        assert not report["unused"]
        assert not report["unfilled"]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], atol=0, rtol=0)
    values = theirs.state_dict()["model.language_model.embed_tokens.weight"]
    assert torch.equal(states[0]["llm.lm.model.embed_tokens.weight"], values)


@pytest.mark.parametrize("layout", ["4.x", "5.x"])
@torch.no_grad()
def test_qwen2_vl_is_a_plain_qwen2_under_mrope(layout, qwen2_vl, tmp_path):
    source = write(qwen2_vl, tmp_path / "in")
    if layout == "5.x":
        rename(
            source,
            lambda n: n.replace("model.", "model.language_model.", 1).replace(
                "visual.", "model.visual.", 1
            ),
        )
    else:  # and its config is flat
        config = json.loads((source / "config.json").read_text())
        text = config.pop("text_config") | {"model_type": "qwen2_vl"}
        rope = text.pop("rope_parameters")
        text |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        (source / "config.json").write_text(json.dumps({**config, **text}))
    assert import_weights.main([str(source), str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["unused_on_purpose"]
    assert all("visual." in name for name in report["unused_on_purpose"])

    sections = report["stages"]["rotary"]["sections"]
    ours = CausalLM(source=str(tmp_path / "out")).eval()
    ours.replace_rotary(lambda original: RotaryEmbedding(MRope(sections), original))
    embeds = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    axes = torch.tensor([[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]])
    decoder = qwen2_vl.model.language_model
    theirs = decoder(inputs_embeds=embeds, position_ids=axes[:, None]).last_hidden_state
    positions = torch.cat([torch.arange(7)[None, None], axes[:, None]]).float()
    hidden = ours(embeds, torch.ones(1, 7, dtype=torch.bool), positions)
    assert_near(ours.head(hidden), qwen2_vl.lm_head(theirs))


def write_ppllava(name, folder):
    """A golden pair's weights as the published checkpoint holds them, and its CLIP's config."""
    spec = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    CLIPConfig(
        text_config=spec["clip_text"],
        vision_config=spec["clip_vision"],
        projection_dim=spec["projection_dim"],
    ).save_pretrained(folder / "clip")
    config = {
        "architectures": ["LlavaInterleaveForConditionalGeneration"],
        "model_type": "llava_next",
        "vision_config": {
            **spec["clip_vision"],
            "model_type": "clip_vision_model",
            "depth": spec["bt_adapter_depth"],
            "max_T": spec["max_T"],
        },
        "text_config": {**spec["llm"], "model_type": "llama"},
        "vision_feature_layer": spec["vision_feature_layer"],
        "image_token_index": spec["image_token_index"],
        "qwen": False,
        "pooling": "ppllava",
        "clip_weight": str(folder / "clip"),
        "clip_post_pretrain": None,
        "btadapter": spec["bt_adapter"],
        "btadapter_depth": spec["bt_adapter_depth"],
        "max_T": spec["max_T"],
        "extend_clip": spec["extended_context"],
        "pooling_temp": spec["temperature"],
        "pooling_kernel": spec["pooling_kernel"],
        "pooling_stride": spec["pooling_stride"],
        "image_pooling_kernel": spec["image_pooling_kernel"],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    return spec, tensors, weights


@pytest.mark.parametrize("stored", ["shards", "bin"])
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
@torch.no_grad()
def test_ppllava_gives_its_golden_logits(name, stored, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    spec, golden, weights = write_ppllava(name, source)
    if stored == "bin":
        torch.save(weights, source / "pytorch_model.bin")
    else:
        placed = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(weights))}
        for file in set(placed.values()):
            save_file({k: v for k, v in weights.items() if placed[k] == file}, source / file)
        index = json.dumps({"weight_map": placed})
        (source / "model.safetensors.index.json").write_text(index)
    model = imported(source, tmp_path / "out")
    assert (model.encoder.adapter is not None) == spec["bt_adapter"]
    for i in range(len(spec["cases"])):
        case = {k.removeprefix(f"case{i}/"): v for k, v in golden.items() if f"case{i}/" in k}
        ids, frames = case["input_ids"], case["pixel_values"].flatten(0, 1)
        read = torch.where(ids == spec["image_token_index"], VISUAL_SLOT, ids)
        batch = replace(
            make_batch(read[0].tolist(), frames, [len(frames)]),
            prompt_ids=case["clip_input_ids"],
            prompt_mask=case["clip_attention_mask"].bool(),
        )
        assert_near(model.llm.head(model(batch).hidden), case["logits"])


def test_ppllava_says_which_clip_it_misses(tmp_path, capsys):
    write_ppllava("public", tmp_path)
    clip = tmp_path / "clip"
    clip.rename(tmp_path / "elsewhere")
    code, error = run(tmp_path, tmp_path / "out", capsys=capsys)
    assert code == 2
    assert str(clip) in error
    assert "--clip" in error


def edit(change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")


def lost_shard(folder):
    placed = {"language_model.model.norm.weight": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def outside(folder):
    index = {"weight_map": {"norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unlike(field, value):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))

    return apply


NORM = "language_model.model.norm.weight"
MISTAKES = {
    "missing": (edit(lambda t: t.pop(NORM)), ["1 parameters", "llm.lm.model.norm.weight", "unfi"]),
    "extra": (edit(lambda t: t.update(more=torch.ones(1))), ["1 of its keys", "more", "unused"]),
    "shape": (
        edit(lambda t: t.update({NORM: torch.ones(5)})),
        [NORM, "(5,)", "llm.lm.model.norm.weight", "(32,)"],
    ),
    "cut": (cut, ["model.safetensors is cut"]),
    "code": (pickled, ["code in weights is never run"]),
    "lost_shard": (lost_shard, ["model-1.safetensors is missing"]),
    "outside": (outside, ["outside", "../other"]),
    "unknown": (unlike("architectures", ["Other"]), ["Other", "LlavaNextForCond"]),
    "projector": (unlike("projector_hidden_act", "relu"), ["projector_hidden_act", "relu"]),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, llava_next, tmp_path, capsys):
    source = write(llava_next, tmp_path / "in")
    spoil, says = MISTAKES[mistake]
    spoil(source)
    capsys.readouterr()
    code = import_weights.main([str(source), str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for word in says:
        assert word in printed.err
    assert "code ran" not in printed.out
    assert not (tmp_path / "out").exists()


def test_tied_weights_may_be_stored_twice_but_not_differ(llava_onevision, tmp_path, capsys):
    embed, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    source = write(llava_onevision, tmp_path / "in")
    edit(lambda t: t.update({head: t[embed].clone()}))(source)
    model = imported(source, tmp_path / "out")
    assert model.llm.lm.lm_head.weight is model.llm.lm.get_input_embeddings().weight
    edit(lambda t: t.update({head: t[embed] + 1}))(source)
    capsys.readouterr()
    code, error = run(source, tmp_path / "other", capsys=capsys)
    assert code == 2
    assert f"{head} and {embed} differ" in error or f"{embed} and {head} differ" in error


def test_what_is_left_over_may_be_allowed(llava_next, tmp_path):
    source = write(llava_next, tmp_path / "in")
    edit(lambda t: (t.pop(NORM), t.update(more=torch.ones(1))))(source)
    model = imported(
        source, tmp_path / "out", "--allow-unused", "m*", "--allow-unfilled", "llm.lm.model.norm.*"
    )
    assert torch.equal(model.llm.lm.model.norm.weight, torch.ones(32)), "as an LLM is made"
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["unused"] == ["more"]
    assert report["unfilled"] == ["llm.lm.model.norm.weight"]


def test_a_hub_id_that_cannot_be_read_and_a_full_folder(llava_next, tmp_path, capsys):
    code, error = run("nobody/nothing", tmp_path / "out", capsys=capsys)
    assert code == 2
    assert "nobody/nothing" in error
    assert error.count("\n") == 1
    source = write(llava_next, tmp_path / "in")
    capsys.readouterr()
    code, error = run(source, source, capsys=capsys)
    assert code == 2
    assert "not empty" in error


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_dtype_is_kept_or_cast(dtype, llava_next, tmp_path):
    source = write(llava_next, tmp_path / "in")
    edit(lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))(source)
    (source / "tokenizer.json").write_text("{}")
    words = ["--dtype", dtype] if dtype else []
    model = imported(source, tmp_path / "out", *words)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype or 'bfloat16'}"}
    norm = load_file(source / "model.safetensors")[NORM]
    assert torch.equal(model.llm.lm.model.norm.weight, norm.to(model.dtype))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def resident_mb(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


@pytest.mark.parametrize("words", [[], ["--dtype", "float32"]], ids=["kept", "cast"])
def test_weights_are_never_in_memory_twice(words, tmp_path, run_ranks):
    """98 MB in ten shards; the peak counts the files' mapped pages too."""
    config = LlavaNextConfig(
        vision_config={**VISION, "model_type": "clip_vision_model"},
        text_config={**TEXT, "model_type": "llama", "vocab_size": 32000, "hidden_size": 384},
    )
    source = LlavaNextForConditionalGeneration(config)
    if words:
        source = source.bfloat16()
    source.save_pretrained(tmp_path / "in", max_shard_size="10MB")
    stored_mb = sum(p.nbytes for p in source.parameters()) / 2**20
    del source
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2

    def grown(rank):
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        assert import_weights.main([str(tmp_path / "in"), str(tmp_path / "out"), *words]) == 0
        return resident_mb("VmHWM") - before

    (peak_mb,) = run_ranks(1, grown)
    written_mb = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) / 2**20
    needed_mb = stored_mb + (written_mb if words else 0)
    assert written_mb > 90
    assert peak_mb < needed_mb + written_mb / 2
