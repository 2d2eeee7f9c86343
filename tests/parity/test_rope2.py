"""Further published schemes: exact positions; axes, cos and sin within float32."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from datamodules.batch import Grid
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.rotary.base import STILL, RotaryEmbedding, RotaryScheme
from lightning_modules.rotary.hope import HopeRope
from lightning_modules.rotary.mrope import MRope, TimedMRope
from lightning_modules.rotary.scaling.dynamic import Dynamic, DynamicByBase
from lightning_modules.rotary.scaling.stretched import MRopePlusPlus, Ntk, YarnV
from lightning_modules.rotary.scaling.yarn import Yarn
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.rotary.vrope import VRope
from lightning_modules.tokens import Layout


def scaled(scheme, scaling):
    scheme.scaling = scaling
    scheme.scaling.check(scheme.num_axes)
    return scheme


class Lumos(RotaryScheme):
    """Lumos-1: frames are counted through the row. It tests a scheme that reads the whole row."""

    def place(self, visual, start):
        raise NotImplementedError

    def axes(self, num_frequencies):
        raise NotImplementedError

    def positions(self, row):
        count, frame, origin, parts = 0, 0, None, []
        for segment in row:
            if isinstance(segment, Layout):
                origin = count if origin is None else origin
                where = segment.coordinates + torch.tensor([frame, 0, 0])
                parts.append(origin + (where * torch.tensor([4.0, 8.0, 8.0])).mT)
                frame, count = frame + segment.extent.t, count + len(segment)
            else:
                parts.append((count + torch.arange(segment).float()).expand(3, -1))
                count += segment
        return torch.cat(parts, dim=1), float(count)


class Date(MRope):
    """DATE: frames of one video share their rows and columns. It tests `Layout.continues`."""

    def positions(self, row):
        start, origin, parts = 0.0, 0.0, []
        for n, segment in enumerate(row):
            if isinstance(segment, Layout):
                origin = origin if segment.continues else start
                time, i, j = segment.coordinates.unbind(1)
                parts.append(torch.stack([start + time, origin + i, origin + j]))
                last = start + segment.extent.t - 1
                beside = [s for s in row[n + 1 : n + 3] if isinstance(s, Layout)]
                sides = origin + max(segment.extent[1:]) - 1
                start = (last if any(s.continues for s in beside) else max(last, sides)) + 1
            else:
                parts.append((start + torch.arange(segment).float()).expand(3, -1))
                start += segment
        return torch.cat(parts, dim=1), start


#: Schemes that are written here, in the test, to show what the contract can say.
SEAMS = {
    "qwen2_5_vl_2": TimedMRope(2.0),  # this one is in configs/rotary
    "qwen2_5_vl_25": TimedMRope(25.0),
    "tmrope_25": TimedMRope(25.0),
    "mmrope_lumos": Lumos(),
    "date_tim": Date(),
}

#: Variants in the golden files that are built here, by name; each takes the sections of a case.
VARIANTS = {
    "hope_1.5": lambda sections=None: HopeRope(1.5, sections),
    "hope_0.75": lambda sections=None: HopeRope(0.75, sections),
    "vrope": lambda sections=None: VRope(),
    "plus_default_4": lambda sections=None: VideoRope(sections=sections),
}

#: Scalings by their name in the published code, each with the scheme that it was written for.
SCALINGS = {
    "ntk": (VideoRope, Ntk),
    "yarn": (VideoRope, partial(Yarn, attention=False)),
    "mrope++": (MRope, MRopePlusPlus),
    "videorope++_v1": (VideoRope, YarnV),
    "dynamic": (VideoRope, Dynamic),
    "videoropepp_dynamic": (VideoRope, DynamicByBase),
}
VARIANTS |= {
    f"plus_{name}_{factor}": lambda sections=None, f=factor, made=made: scaled(
        made[0](sections=sections), made[1](float(f))
    )
    for name, made in SCALINGS.items()
    for factor in (2, 4)
}


def read_row(segments, seconds_per_step=(), videos=()):
    """`["text", n]`, `["image", h, w]` or `["video", t, h, w]` -> number or layout."""
    steps = iter(seconds_per_step)
    parts = [n > 0 for v in videos for n in range(v["grid"][0] if v["stamp_tokens"] else 1)]
    continues, row = iter(parts), []
    for kind, *sizes in segments:
        if kind == "text":
            row.append(sizes[0])
            continue
        seconds, grid = None, Grid(*([1, *sizes] if kind == "image" else sizes))
        if kind == "video" and (step := next(steps, None)) is not None:
            seconds = tuple((torch.arange(grid.t) * torch.tensor(step)).tolist())
        row.append(replace(Layout.full(grid, seconds), continues=next(continues, False)))
    return row


def embedding_of(scheme, head_dim, theta):
    sizes = {"hidden_size": head_dim, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
    rope = {"rope_type": "default", "rope_theta": theta}
    llm = CausalLM(config={"model_type": "qwen2", "rope_parameters": rope, **sizes})
    llm.replace_rotary(lambda original: RotaryEmbedding(scheme, original))
    return llm.decoder.rotary_emb


@pytest.mark.parametrize("name", ["hope_1.5", "hope_0.75", "vrope", *SEAMS])
def test_positions(rope2_golden, name):
    scheme, compared = SEAMS[name] if name in SEAMS else VARIANTS[name](), 0
    for i, case in enumerate(rope2_golden.spec["cases"]):
        if name not in case["schemes"]:
            continue
        row = read_row(case["segments"], case["seconds_per_step"], case.get("videos", ()))
        positions, following = scheme.positions(row)
        expected = rope2_golden.tensors[f"case{i}/{name}/position_ids"][:, 0]
        assert torch.equal(positions, expected)
        assert case["schemes"][name]["next_position"] == [following] * scheme.num_axes
        compared += 1
    assert compared


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows(rope2_golden, side):
    compared = 0
    for i, batch in enumerate(rope2_golden.spec["batches"]):
        for name in VARIANTS.keys() & batch["schemes"].keys():
            scheme = VARIANTS[name]()
            rows = [read_row(row) for row in batch["rows"]]
            found = scheme.batch_positions(rows, side)[1:]
            prefix = f"batch{i}/{name}/{side}"
            mask = rope2_golden.tensors[f"{prefix}/mask"].bool()
            expected = rope2_golden.tensors[f"{prefix}/position_ids"]
            assert torch.equal(found[:, mask], expected[:, mask])
            following = scheme.batch_following(rows)
            assert following.tolist() == batch["schemes"][name][side]["next_position"]
            compared += 1
    assert compared


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("plus")])
def test_scaled_frequencies(rope2_golden, name):
    """Those of rows as long as in training, and of one that reaches `longest_position`."""
    compared = 0
    for k, entry in enumerate(rope2_golden.spec["rotary"]):
        if entry["variant"] != name:
            continue
        scheme = VARIANTS[name](entry["sections"])
        embedding = embedding_of(scheme, entry["head_dim"], entry["rope_theta"])
        for part, last in (("inv_freq", 9.0), ("inv_freq_long", entry.get("longest_position"))):
            if last is None:
                continue
            positions = torch.full((scheme.num_axes, 1, 1), last)
            found, factor, _ = embedding._radians(torch.device("cpu"), positions[0], positions)
            expected = rope2_golden.tensors[f"rotary{k}/{part}"]
            torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)
            assert factor == 1
            compared += 1
    assert compared


@pytest.mark.parametrize("name", VARIANTS)
def test_axes_cos_and_sin(rope2_golden, name):
    entries = [(k, e) for k, e in enumerate(rope2_golden.spec["rotary"]) if e["variant"] == name]
    assert entries or name == "hope_0.75"
    for k, entry in entries:
        golden = {
            part: rope2_golden.tensors[f"rotary{k}/{part}"]
            for part in ("positions", "pairs", "axes", "cos", "sin")
        }
        scheme = VARIANTS[name](entry.get("sections"))
        embedding = embedding_of(scheme, entry["head_dim"], entry["rope_theta"])
        axes = scheme.axes(entry["head_dim"] // 2)
        turns = axes != STILL
        assert torch.equal(axes[turns], golden["axes"])
        embedding.axis_positions = golden["positions"].float()[:, None]
        length = golden["positions"].shape[1]
        cos, sin = embedding(torch.zeros(1, length, 8), torch.arange(length)[None])
        # The README allows 1e-6 * (1 + the largest position): angles are float32.
        allowed = 1e-6 * (1 + golden["positions"].abs().max().item())
        first, second = golden["pairs"].T
        for ours, theirs in ((cos, golden["cos"]), (sin, golden["sin"])):
            for channels in (first, second):
                torch.testing.assert_close(
                    ours[0][:, channels], theirs[:, channels], atol=allowed, rtol=0
                )
        still = entry.get("still_dims", [])
        assert (cos[0][:, still] == 1).all()
        assert (sin[0][:, still] == 0).all()
        assert sorted(still) == sorted(
            n + half for n in range(len(axes)) if not turns[n] for half in (0, len(axes))
        )
