"""Names of run directories and factors of ablations depend on values, not on typed words."""

import itertools
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments import CONFIG_DIR
from experiments.command.names import name_run
from experiments.command.overrides import DELETED, read_overrides, read_value, show_value
from experiments.reporting import tables as report_tables
from experiments.reporting.data import load_runs
from experiments.run.read import read_runs
from experiments.run.settings import factors

LIGHT = Path(__file__).parents[1] / "launcher" / "cluster" / "configs" / "light.yaml"
GROUPS = {"pooler", "trainer", "llm", "module/loss", "scores", "tiles", "my", "my_group"}

TYPED = [
    *("2e-3", "0.002", "2.0e-3", "2E-3", "1", "1.0", "+1", "-1", "1_000", "1e5", "1.", ".5", "nan"),
    *("-inf", "00", "01", "1a", "2x2", "1e", "1.5.2", "true", "False", "TRUE", "null", "Null"),
    *("none", "yes", "on", "0x10", "a_b", "a/b", "a-b", "a.b", "a@b", "bf16-mixed", "-", ".", ""),
    *("'1'", '"true"', "''", "[1,2]", "[a,'b,c',null]", "{a:1,b:{c:[x]}}", "${seed}", "~", "a:b"),
]


@pytest.mark.parametrize("text", [*TYPED, "'a b'", "[a, 'b, c']", "{a: 1, b: {c: 2}}"])
def test_a_value_is_read_as_hydra_reads_it(text):
    expected = text
    if text != "~":  # which Hydra refuses
        expected = OverridesParser.create().parse_override(f"key={text}").value()
    assert repr(read_value(text)) == repr(expected)  # 1 and 1.0 differ, and nan equals nan


def test_equal_values_have_one_text_and_others_have_others():
    same = [["2e-3", "0.002", "2.0e-3"], ["false", "False"], ["null", "Null"], ["a", "'a'", '"a"']]
    same += [
        ["[1,2]", "[1, 2]"],
        ["{b:2,a:1}", "{a: 1, b: 2}"],
        ["1_000", "1000"],
        ["1e-5", "0.00001"],
        ["1", "1.0", "1.", "1e0", "+1"],
        ["-3", "-3.0"],
        ["0", "-0.0"],
        ["1e15", "1_000_000_000_000_000"],
        ["1e16", "1.0e16", "10000000000000000"],
        ["[1,{a:2}]", "[1.0,{a:2.0}]"],
    ]
    texts = [{show_value(read_value(typed)) for typed in alike} for alike in same]
    assert texts == [
        {"0.002"}, {"false"}, {"null"}, {"a"}, {"[1,2]"}, {"{a:1,b:2}"}, {"1000"}, {"1e-5"},
        {"1"}, {"-3"}, {"0"}, {"1000000000000000"}, {"1e16"}, {"[1,{a:2}]"}
    ]  # fmt: skip
    others = [1, 1.5, "1", "1.0", True, "true", None, "null", "", [], {}, "[]", "{}", [1], ["1"]]
    others += [[1, 2], "[1,2]", ["1,2"], [[1], 2], {"a": 1}, "{a:1}", {"a": "1"}, "-inf", -1e999]
    others += [10**16 + 1, 10**400, 1e16, 1e22, 2**53, 2**53 + 1, float("nan"), math.inf, "1e16"]
    assert len({show_value(value) for value in others}) == len(others)


def test_overrides_are_read_as_hydra_applies_them():
    words = ["a.b=1", "+c=x", "a.b=2", "++d={e: 1, f: {g: [1]}}", "~h", "d.e=3", "i={}", "d.f=null"]
    assert read_overrides(words) == {
        "a.b": 2, "c": "x", "d.e": 3, "d.f": None, "h": DELETED, "i": {}
    }  # fmt: skip


# Names


def test_simple_names_are_what_they_have_always_been():
    assert name_run("videorope", 0, {}, GROUPS) == "videorope-seed0"
    for settings, name in [
        ({"pooler": "average_2x2"}, "tad-seed1-pooler_average_2x2"),
        ({"model.rotary.temporal_spacing": 2}, "tad-seed1-model.rotary.temporal_spacing_2"),
        ({"optim.optimizer.lr": 0.002}, "tad-seed1-optim.optimizer.lr_0.002"),
        ({"tiles": None}, "tad-seed1-tiles_null"),
    ]:
        assert name_run("tad", 1, settings, GROUPS) == name
    several = {"trainer": "cpu", "pooler": "average", "module/loss": "ipo", "a.b": -1e-5}
    assert name_run("tad", 1, several, GROUPS) == (
        "tad-seed1-a.b_-1e-5-module.loss_ipo-pooler_average-trainer_cpu"
    )


HASHED = re.compile("-[0-9a-f]{12}$")

#: Pairs of settings that a name without a hash would not distinguish.
ALIKE = [
    ({"a": "b/c"}, {"a": "b_c"}),
    ({"a": "b c"}, {"a": "b_c"}),
    ({"a": [1, 2]}, {"a": "1_2"}),
    ({"a": "b_c_d"}, {"a": "b", "c": "d"}),
    ({"a": "b-c_d"}, {"a": "b", "c": "d"}),
    ({"pooler": "a-b_c"}, {"pooler": "a", "b": "c"}),
    ({"image": "size_3"}, {"image_size": 3}),
    ({"llm": "tiny_llama"}, {"llm_tiny": "llama"}),
    ({"my_group": "a"}, {"my": "group_a"}),
    ({"module/loss": "ipo"}, {"module.loss": "ipo"}),
    ({"module/loss": "ipo"}, {"module_loss": "ipo"}),
    ({"a": True}, {"a": "true"}),
    ({"a": 1}, {"a": "1"}),
    ({"a": None}, {"a": "null"}),
    ({"a": DELETED}, {"a": "~"}),
    ({"a": ""}, {"a": "_"}),
    ({"a": "ä"}, {"a": "ö"}),
    ({"a": "x" * 300 + "1"}, {"a": "x" * 300 + "2"}),
    ({"a": 1, "b": 2}, {"a_1-b": 2}),
    ({"a": "1e", "5_b": 2}, {"a": "1e-5_b_2"}),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_two_settings_never_share_a_name(one, other):
    names = [name_run("tad", 0, settings, GROUPS) for settings in (one, other)]
    assert names[0] != names[1]
    for name in names:
        assert len(name.encode()) <= 150
        assert re.fullmatch(r"[A-Za-z0-9_.+-]+", name)


def test_a_name_that_looks_hashed_is_hashed():
    settings = {"a": "x" * 300}
    cut, digest = name_run("tad", 0, settings, GROUPS).rsplit("-", 1)
    twin = {"a": f"{cut.removeprefix('tad-seed0-a_')}-{digest}"}
    assert name_run("tad", 0, twin, GROUPS) != f"{cut}-{digest}"


@pytest.mark.parametrize("more", [{}, {"b": "c d"}], ids=["read back", "with a hash"])
def test_a_whole_number_has_one_name(more):
    names = {name_run("tad", 0, {"a": value, **more}, GROUPS) for value in (1, 1.0)}
    assert len(names) == 1
    assert name_run("tad", 0, {"a": "1.0", **more}, GROUPS) not in names


def exact(settings: dict[str, Any]) -> str:
    """Returns a key that differs for all unequal settings and types. 1 and 1.0 are equal."""
    numbers = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in settings.items()
    }
    return repr(sorted((key, repr(value)) for key, value in numbers.items()))


def read_back(name: str) -> dict[str, Any]:
    """Returns the settings that a name without a hash shows, by the rules in words."""
    rotary, seed, *pieces = name.split("-")
    assert (rotary, seed) == ("tad", "seed0")
    words: list[str] = []
    for piece in pieces:
        if "_" in piece and re.match("[A-Za-z]", piece):
            words.append(piece)
        else:
            words[-1] += f"-{piece}"
    groups = {group.replace("/", "."): group for group in GROUPS}
    settings = {}
    for word in words:
        group, _, option = word.partition("_")
        if group in groups:
            settings[groups[group]] = read_value(option)
        else:
            key, _, value = word.rpartition("_")
            settings[key] = read_value(value)
    return settings


def test_any_name_can_be_read_back_or_has_a_hash():
    draw = random.Random(0)
    keys = ["a", "a.b", "a_b", "b", "5_b", "llm_x", "lr", *GROUPS]
    values = [*map(read_value, TYPED), "b-a_1", "seed0", "b_1-lr", -1, -2.5e-7, "x-1", "1e-5x"]
    seen: dict[str, str] = {}
    plain = 0
    for _ in range(4_000):
        chosen = draw.sample(keys, draw.randint(0, 3))
        settings = {key: draw.choice(values) for key in chosen}
        name = name_run("tad", 0, settings, GROUPS)
        assert seen.setdefault(name, exact(settings)) == exact(settings), name
        if not HASHED.search(name):
            plain += 1
            assert exact(read_back(name)) == exact(settings), name
    assert plain > 400


# With Hydra


@pytest.fixture
def name_of(tmp_path, monkeypatch):
    """`name_of(*words)` returns the name of a run of a small program with these words."""
    shutil.copy(LIGHT, tmp_path / "light.yaml")
    monkeypatch.chdir(tmp_path)

    def name(*words: str) -> str:
        with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
            searched = [f"hydra.searchpath=[file://{CONFIG_DIR}]", *words]
            config = hydra.compose("light", searched, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        return config.run_name

    return name


def test_how_a_setting_is_typed_does_not_matter(name_of):
    for words in (
        ["value=2e-3"], ["value=0.002"], ["value=2.0e-3"], ["++value=2e-3"],
        ["value=1", "value=2e-3"], ["seed=0", "value=2E-3"],
    ):  # fmt: skip
        assert name_of(*words) == "seed0-value_0.002", words
    several = ["value=2e-3", "+a={b: 1}", "stubborn=False", "launcher=local_parallel"]
    assert name_of(*several) == "seed0-a.b_1-stubborn_false-value_0.002"
    several = ["stubborn=false", "+a.b=1", "launcher=slurm", "value=0.002"]
    assert name_of(*several) == "seed0-a.b_1-stubborn_false-value_0.002"
    assert HASHED.search(name_of("stubborn='false'"))


def test_interpolations_count_as_what_they_stand_for(name_of, monkeypatch):
    monkeypatch.setenv("VALUE", "x")
    assert name_of("value=${oc.env:VALUE}") == name_of("value=x") == "seed0-value_x"
    assert HASHED.search(name_of("value='of ${run_name}'"))


def test_words_that_change_nothing_are_not_in_the_name(name_of):
    words = ["name=other", "launcher=slurm", "paths={runs: x}", "resume=false"]
    assert name_of(*words) == "seed0"


def test_names_of_ropelab_train(compose, tmp_path):
    words = ["experiment=vniah_d_tiny", "rotary=mrope", "pooler=average_2x2", "seed=1"]
    run_name = compose(words, tmp_path).run_name
    assert run_name == "mrope-seed1-pooler_average_2x2"


# Factors


def write_run(folder: Path, *words: str, lr: float = 0.001, flag: bool = True) -> None:
    """Writes a directory as a run leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(words)))
    choices = {"rotary": "videorope", "pooler": "average", "tiles": None, "scores": ["mc", "open"]}
    hydra_node = {"hydra": {"runtime": {"choices": choices}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra_node))
    config = {"seed": 0, "optim": {"lr": lr, "flag": flag}, "list": ["a", 1]}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))


def settings_of(folder: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """Returns the factors of ropelab-runs, and the factors and settings of ropelab-report."""
    runs = load_runs([folder])
    axes = list(factors([run.settings for run in runs]))
    return (
        factors([run.settings for run in read_runs([folder])]),
        axes,
        [g.label for g in report_tables.group_runs(runs, axes)],
    )


def test_one_setting_in_other_words_is_one_level_of_a_factor(tmp_path):
    write_run(tmp_path / "a", "optim.lr=2e-3", "optim.flag=False", lr=0.002, flag=False)
    write_run(tmp_path / "b", "optim.lr=0.002", "optim.flag=false", lr=0.002, flag=False)
    write_run(
        tmp_path / "c", "optim={lr: 2.0e-3, flag: FALSE}", "pooler='average'", lr=0.002, flag=False
    )
    write_run(
        tmp_path / "d", "tiles=null", "scores=[mc, open]", "+list=[a, 1]", lr=0.002, flag=False
    )
    axes, reported, _ = settings_of(tmp_path)
    assert axes == {}
    assert reported == []


def test_levels_of_a_factor_are_values_said_or_not(tmp_path):
    write_run(tmp_path / "a", "optim.lr=2e-3", lr=0.002)
    write_run(tmp_path / "b", "optim.lr=1e-3")
    write_run(tmp_path / "c", "seed=0")
    axes, reported, labels = settings_of(tmp_path)
    assert axes == {"optim.lr": ["0.002", "0.001", "0.001"]}
    assert reported == ["optim.lr"]
    assert labels == ["0.002", "0.001"]


def test_labels_tell_settings_apart_whose_keys_end_alike(tmp_path):
    for number, (one, other) in enumerate(itertools.product((1, 2), (1, 2))):
        write_run(tmp_path / str(number), f"+a.lr={one}", f"+b.lr={other}")
    _, _, labels = settings_of(tmp_path)
    assert labels == ["a.lr=1, b.lr=1", "a.lr=1, b.lr=2", "a.lr=2, b.lr=1", "a.lr=2, b.lr=2"]
