"""docs/extend.md: the files of the page are added to the packages and configs, and are used."""

import ast
import csv
import importlib
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, Grid, Task
from datamodules.shards.annotations import formats
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import draw_frames, encode_video
from experiments import report, shards, train
from experiments.command.values import check_values
from experiments.reporting import plots
from experiments.reporting.data import load_runs
from experiments.run.compose import build, plain
from lightning_modules import spec
from lightning_modules.metrics.base import Answered
from tests import test_configs
from tests.experiments.reporting.test_report import write_run
from tests.helpers.questions import make_question
from tests.helpers.quiet import QUIET
from tests.helpers.uneven import make_rows
from tests.lightning_modules import test_contract
from tests.lightning_modules.rotary import test_rotary

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
#: The files of the page: the text by path.
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)```", PAGE, flags=re.M | re.S))
#: The lines that the page adds to tables: the value, as Python, by name.
LINES = dict(re.findall(r'^```python\n"(\w+)": (.*),\n```', PAGE, flags=re.M))
COMMANDS = re.findall(r"^ropelab-train (.*)$", PAGE, flags=re.M)

SMALL = ["optim=adamw_tiny", "trainer=cpu", *QUIET, "logger=csv"]


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    """A folder with all files of the page, in which the packages look for modules, too."""
    folder, before = tmp_path_factory.mktemp("checkout"), set(sys.modules)
    rooms = {}
    for path, text in FILES.items():
        assert not (ROOT / path).exists()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        parent = Path(path).parent
        if path.endswith(".py") and parent.parts:
            rooms[importlib.import_module(".".join(parent.parts))] = str(folder / parent)
    for room, place in rooms.items():
        room.__path__.append(place)
    importlib.invalidate_caches()
    yield folder
    for room, place in rooms.items():
        room.__path__.remove(place)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def composed(compose, checkout):
    """`composed(folder, *overrides)`: a config that may name the options of the page."""
    search = f"hydra.searchpath=[file://{checkout}/configs]"
    return lambda folder, *overrides: compose([*overrides, search], folder)


@pytest.fixture(scope="module")
def make(composed, tmp_path_factory):
    """`make(component, option)` builds a component, as the contract tests want it."""
    folder = tmp_path_factory.mktemp("made")

    def make(component, option):
        torch.manual_seed(0)
        return spec.build(plain(composed(folder, f"{component}={option}").model[component]))

    return make


def check_contract(tests, **known):
    """Runs every test of a class with the arguments that it asks for."""
    for name, test in inspect.getmembers(tests, inspect.ismethod):
        if name.startswith("test_"):
            test(**{word: known[word] for word in inspect.signature(test).parameters})


def read_json(path):
    return json.loads(path.read_text())


def test_the_page_has_every_file_and_line():
    assert len(FILES) == 19
    assert LINES.keys() == {"frame", "steps", "last_loss"}
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert all((ROOT / "docs" / link).is_file() for link in links)


def test_the_files_have_the_style_of_the_project(checkout):
    config = ["--no-cache", "--config", ROOT / "pyproject.toml", "--config", f"src = ['{ROOT}']"]
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, *map(str, config), "."]
        result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command, composed, tmp_path):
    """Of a multirun, the job with the last value of each list."""
    words = [re.sub(r"=[^\[]*,", "=", word) for word in shlex.split(command) if word != "-m"]
    check_values(composed(tmp_path, *words))


def test_the_scheme_keeps_the_contract(checkout, monkeypatch):
    monkeypatch.setattr(test_rotary, "CONFIG_DIR", checkout / "configs")
    monkeypatch.setitem(test_rotary.ROWS, "frame", ast.literal_eval(LINES["frame"]))
    layouts = [test_rotary.LAYOUT, test_rotary.LAYOUT]
    check_contract(test_rotary.TestContract(), option="frame", layouts=layouts)


def test_the_pooler_keeps_the_contract(make):
    check_contract(test_contract.TestPooler(), option="frame_stride", make=make)
    for rotary in ("mrope", "frame"):
        test_contract.test_keep_is_the_positions_of_the_patches("frame_stride", rotary, make)
    tokens = test_contract.draw(Grid(5, 2, 3))
    kept = make("pooler", "frame_stride")(tokens).layout.coordinates
    assert kept[:, 0].unique().tolist() == [0, 2, 4]


def test_the_pooler_that_chooses_keeps_the_contract(make):
    check_contract(test_contract.TestPooler(), option="top_patches", make=make)
    for rotary in ("mrope", "frame"):
        test_contract.test_keep_is_the_positions_of_the_patches("top_patches", rotary, make)
    tokens = test_contract.draw(Grid(2, 2, 3))
    relevance = torch.tensor([1.0, 6, 2, 5, 3, 4, 4, 3, 5, 2, 6, 1]) / 10
    pooled = make("pooler", "top_patches")(tokens, relevance)
    rows_and_columns = [[0, 1], [1, 0], [1, 1], [1, 2], [0, 0], [0, 1], [0, 2], [1, 1]]
    assert pooled.layout.coordinates[:, 1:].tolist() == rows_and_columns
    assert torch.equal(pooled.features, tokens.features[[1, 3, 4, 5, 6, 7, 8, 10]])


TESTS = {
    "extent": "test_extent_is_the_grid_that_the_tokens_fill",
    "layout": "test_the_rest_of_the_layout_is_handed_on",
    "shortcut": "test_the_second_linear_may_run_after_the_pooler",
    "weights": "test_tokens_of_equal_patches_are_equal_to_them",
    "centre": "test_a_token_stands_at_the_centre_of_what_it_was_made_of",
    "autograd": "test_the_features_depend_on_the_prompt_for_autograd",
    "dtype": "test_half_precision_is_kept",
    "order": "test_coordinates_lie_on_the_extent_in_reading_order",
}
BARE = "type(tokens.layout)(coordinates, tokens.layout.extent)"


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("extent", "coordinates, grid)", "coordinates, Grid(1, 1, len(kept)))"),
        ("extent", "tokens.features[kept]", "tokens.features[kept][1:]"),
        ("layout", "tokens.moved(features, coordinates,", f"VisualTokens(features, {BARE},"),
        ("shortcut", "expand(features)", "2 * expand(features)"),
        ("shortcut", "expand(features)", "expand(features).relu()"),
        ("weights", "tokens.features[kept]", "2 * tokens.features[kept]"),
        ("centre", "(kept.device)[kept]", "(kept.device)[: len(kept)]"),
        ("centre", "(kept.device)[kept]", "(kept.device)[kept.flip(0)]"),
        ("centre", "(kept.device)[kept]", "(kept.device)[kept] / 2"),
        ("autograd", " + 0 * relevance[kept, None].to(features.dtype)", ""),
        ("dtype", "relevance[kept, None].to(features.dtype)", "relevance[kept, None]"),
        ("order", ".indices.sort(-1).values", ".indices"),
        ("order", "regular = False", "regular = True"),
    ],
)
def test_the_contract_refuses_a_wrong_pooler(test, right, wrong):
    """Each case is one wrong line in the pooler of the page; the file's name does not matter."""
    text = FILES["lightning_modules/pooler/top_patches.py"]
    assert text.count(right) == 1
    found: dict = {}
    exec(text.replace(right, wrong), found)
    check = getattr(test_contract.TestPooler(), TESTS[test])
    with pytest.raises((AssertionError, RuntimeError)):
        check(option="odd", make=lambda component, option: found["TopPatchesPooler"]())


def test_images_in_tiles_are_refused_behind_a_choice(tiny, composed, tmp_path):
    words = [*tiny, "pooler=top_patches", "+model.tiles.newline=true"]
    config = composed(tmp_path, *words)
    module = build(config.module, "module")(model=plain(config.model))
    with pytest.raises(ValueError, match="have no rows and columns"):
        module.configure_model()


def test_the_encoder_keeps_the_contract(make):
    check_contract(test_contract.TestEncoder(), option="linear_patches", make=make)
    encoder = make("encoder", "linear_patches")
    again = spec.build(encoder.to_spec())
    assert (again.width, again.grid) == (encoder.width, encoder.grid) == (96, (4, 4))
    assert not encoder.reads_prompts
    with pytest.raises(ValueError, match="no text tower"):
        encoder.align(torch.zeros(1, 16, 96))


@pytest.fixture(scope="module")
def trained(tiny, composed, tmp_path_factory):
    """A run of the tiny recipe with scheme, pooler, encoder and stage of the page."""
    folder = tmp_path_factory.mktemp("trained")
    words = [word for word in tiny if not word.startswith("model.encoder.config")]
    own = ["rotary=frame", "pooler=frame_stride", "encoder=linear_patches", "module=z_loss"]
    words += [*own, "model.encoder.patch_size=8", "model.encoder.width=32", "logger=csv"]
    train.main.__wrapped__(composed(folder, *words))
    return folder


def test_the_components_are_trained_and_tested_together(trained):
    assert read_json(trained / "done.json")["steps"] == 12
    assert read_json(trained / "needle.json")["rotary"] == "frame"
    with (trained / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < losses[0]


def test_the_stage_adds_its_penalty(tiny, composed, tmp_path):
    config = composed(tmp_path, *tiny, "module=z_loss", "module.z_weight=0.5", "scores=[none]")
    module = build(config.module, "module")(model=plain(config.model))
    module.configure_model()
    with torch.no_grad():
        output = module.network(make_rows([0, 1, 3]))
        total, count = module.terms(output)
        logits = module.network.llm.head(output.hidden)
    penalty = sum(
        logits[row, place - 1].logsumexp(0).item() ** 2
        for row, labels in enumerate(output.inputs.labels)
        for place, label in enumerate(labels.tolist())
        if label != IGNORE_INDEX
    )
    assert total.item() == pytest.approx(output.losses.sum().item() + 0.5 * penalty, rel=1e-5)
    assert count == output.labelled


def write_clips(folder, count):
    folder.mkdir()
    for number in range(count):
        (folder / f"v1.{number}.mp4").write_bytes(encode_video(draw_frames(number, 4, 32)[0]))
    return sorted(folder.iterdir())


def test_the_datamodule_works_with_every_callback(composed, tmp_path):
    clips = write_clips(tmp_path / "clips", 4)
    for split, questions in (("train", 4), ("val", 1)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file", "question", "answer"])
            table.writerows([c, f"Which, {n}?", "red"] for c in clips for n in range(questions))
    words = ["data=table", *(f"data.{s}={tmp_path}/{s}.csv" for s in ("train", "val"))]
    folder = tmp_path / "run"
    folder.mkdir()
    sizes = ["data.frames.sampler.num_frames=2", "data.audit=true", "scores=[perplexity]"]
    train.main.__wrapped__(composed(folder, *SMALL, *words, *sizes))

    assert read_json(folder / "done.json")["samples"] == 16
    assert read_json(folder / "status.json")["step"] == 2
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert read_json(folder / "scores.json")[-1]["scores"][0]["count"] == 4
    steps = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    keys = [key for step in steps for key in step["keys"]]
    assert sorted(keys) == [f"{clip} Which, {n}?" for clip in clips for n in range(4)]
    assert (folder / "generations.jsonl").exists()


def test_own_shards_are_trained_on_and_scored(checkout, composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, clip in enumerate(write_clips(tmp_path / "clips", 8)):
        clip.with_suffix(".txt").write_text(f"caption {number}\n")
    runpy.run_path(str(checkout / "pack_clips.py"))
    assert shards.main(["verify", "data/clips"]) == 0
    questions = [(f"{n:04d}", make_question(n)) for n in range(8)]
    write_shard(tmp_path / "val" / "shard-000000.tar", questions)

    folder = tmp_path / "run"
    folder.mkdir()
    words = ["data=clips", "paths.data=data", "data.val=val", "scores=[mc,letter_probability]"]
    fewer = ["data.frames.sampler.num_frames=2", "data.stream.num_workers=0"]
    train.main.__wrapped__(composed(folder, *SMALL, *words, *fewer))
    assert read_json(folder / "done.json")["samples"] == 8
    rows = {row["name"]: row for row in read_json(folder / "scores.json")[-1]["scores"]}
    assert rows["mc_probability"]["count"] == 2
    assert 0 < rows["mc_probability"]["value"] < 1


def test_the_recipe_trains_on_own_clips(checkout, composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, clip in enumerate(write_clips(tmp_path / "clips", 8)):
        clip.with_suffix(".txt").write_text(f"caption {number}\n")
    runpy.run_path(str(checkout / "pack_clips.py"))
    folder = tmp_path / "run"
    folder.mkdir()
    fewer = ["paths.data=data", "data.stream.num_workers=0", *QUIET, "logger=csv"]
    config = composed(folder, "experiment=clips", *fewer)
    assert (config.name, config.model.positions) == ("clips", "keep")
    train.main.__wrapped__(config)
    assert read_json(folder / "done.json")["samples"] == 16

    monkeypatch.setattr(test_configs, "CONFIG_DIR", checkout / "configs")
    monkeypatch.setitem(test_configs.RECIPES, "clips", ["experiment=clips"])
    test_configs.test_a_recipe_states_its_command_and_what_it_gives("clips", lambda name: config)


def test_the_score_is_a_probability_among_the_options():
    module = importlib.import_module("lightning_modules.metrics.letter_probability")
    score = module.LetterProbability()
    options = tuple(torch.tensor([0.1, 0.3]).log().tolist())
    for key, answer in (("a", "A"), ("b", "B"), ("b", "B")):
        task = Task((answer,), ("red", "blue"))
        score.update([Answered(key, task, -1.0, 1, options), Answered("c", None, -1.0, 1)])
    ((value, count),) = score.compute().values()
    assert (value, count) == (pytest.approx((0.25 + 0.75) / 2), 2)


def test_the_annotation_format_is_packed(tmp_path, monkeypatch, capsys):
    steps = importlib.import_module("datamodules.shards.annotations.steps")
    monkeypatch.setitem(formats.READERS, "steps", eval(LINES["steps"], vars(steps)))
    (clip,) = write_clips(tmp_path / "videos", 1)
    good = {"clip": clip.name, "steps": ["Cut it.", "Fry it."], "source": "here"}
    bad = [{**good, "steps": "Cut it."}, {**good, "clip": None}, {**good, "other_clip": "b.mp4"}]
    for entries, output, code in (([good, *bad], "many", 1), (good, "one", 0)):
        (tmp_path / "steps.json").write_text(json.dumps(entries))
        words = ["--videos", tmp_path / "videos", "--annotations", tmp_path / "steps.json"]
        words += ["--output", tmp_path / output, "--workers", 1]
        assert shards.main(["pack", *map(str, words)]) == code
        with tarfile.open(tmp_path / output / "shard-000000.tar") as tar:
            sample = {Path(member.name).suffix: tar.extractfile(member).read() for member in tar}
        assert sample[".mp4"] == clip.read_bytes()
        entry = json.loads(sample[".json"])
        assert entry["conversations"][1]["value"] == "1. Cut it.\n2. Fry it."
        assert (entry["video"], entry["source"], "clip" in entry) == (clip.name, "here", False)
    shown = capsys.readouterr().out
    for fault in ("steps: a list of texts", "slot_mismatch", "'other_clip' names b.mp4"):
        assert fault in shown


def test_the_plot_is_a_section_of_both_pages(tmp_path, monkeypatch):
    own = importlib.import_module("experiments.reporting.last_loss")
    monkeypatch.setitem(plots.PLOTS, "last_loss", eval(LINES["last_loss"], vars(own)))
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), "mrope", seed)
    for page in report.write_report(load_runs([tmp_path / "runs"]), tmp_path):
        text = page.read_text()
        assert text.index("Training") < text.index("Last validation loss")
        assert "one row for each setting and one dot for each seed" in text
    assert "(report_files/last_loss.svg)" in text
    assert "<svg" in (tmp_path / "report_files" / "last_loss.svg").read_text()
    assert own.draw_last_loss([]) is None
