"""Every option of every group composes, and its classes can be built."""

import inspect
import re
import subprocess
from functools import cache
from importlib import import_module
from typing import Any

import hydra
import lightning
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

import experiments.command.names  # noqa: F401 - registers the resolvers
from datamodules.common.spec import resolve
from experiments import CONFIG_DIR
from experiments.command.old_words import NEW_KEYS, without_plus
from experiments.run.compose import build, build_all, plain
from lightning_modules import spec
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.grids import fitting_side

STAGES = ("encoder", "pooler", "rotary", "llm")
PROGRAMS = {path.stem for path in CONFIG_DIR.glob("*.yaml")}
#: (group, option) of every file at every level, without programs and the untracked group.
OPTIONS = sorted(
    (str(path.parent.relative_to(CONFIG_DIR)), path.stem)
    for path in CONFIG_DIR.rglob("*/*.yaml")
    if path.parent.name != "local"
)
#: Words that choose the options of a group inside an option of another group.
WITHIN = {
    "data/frames": ["data=instruct"],
    "data/sampler": ["data=instruct"],
    "data/tiny": ["data=tiny"],
    "module/loss": ["module=preference"],
    "module/reference": ["module=preference"],
}
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]
SCALED = [name for group, name in OPTIONS if group == "scale/tiny"]
#: The words of every recipe at every scale.
RECIPES = {
    **{name: [f"experiment={name}"] for name in EXPERIMENTS},
    **{f"{name}-tiny": [f"experiment={name}", "scale=tiny"] for name in SCALED},
}


def targets(node) -> list[str]:
    if isinstance(node, ListConfig):
        return [name for child in node for name in targets(child)]
    if not isinstance(node, DictConfig):
        return []
    own = [node["_target_"]] if node.get("_target_") else []
    return own + [name for key in node for name in targets(node._get_node(key))]


def named(groups: list[str] | None = None) -> list:
    """Returns the options of some groups, or of all, as parameters whose ids are words."""
    chosen = [option for option in OPTIONS if groups is None or option[0] in groups]
    return [pytest.param(*option, id="=".join(option)) for option in chosen]


def words_for(group: str, name: str) -> list[str]:
    """Returns the words of a command line that chooses the option."""
    if group == "scale/tiny":
        return [f"experiment={name}", "scale=tiny"]
    if group == "scale":
        return ["experiment=clip_context", f"scale={name}"]
    # A recipe with a needle test, for which eval= has an effect.
    recipe = [] if group == "experiment" else ["experiment=vniah_d_tiny"]
    return [*recipe, *WITHIN.get(group, []), f"{group}={name}"]


@pytest.fixture(scope="module")
def recipe(compose, tmp_path_factory):
    """`recipe(name)` returns its config, composed once."""
    return cache(lambda name: compose(RECIPES[name], tmp_path_factory.mktemp("recipe")))


@pytest.mark.parametrize(("group", "name"), named())
def test_every_option_composes_and_names_what_exists(group, name, compose, tmp_path):
    config = compose(words_for(group, name), tmp_path, "plan")  # the program that has all groups
    if group == "scale/tiny":
        assert config.name.endswith("_tiny")
    elif group != "hydra":  # Hydra chooses from this group itself, so it is not among the choices
        assert HydraConfig.get().runtime.choices[group] == name
    for target in targets(config):
        module, _, attribute = target.rpartition(".")
        assert hasattr(import_module(module), attribute), target


@pytest.mark.parametrize(("group", "name"), named(list(STAGES)))
def test_every_stage_fits_the_tiny_ones(group, name, compose, tmp_path):
    """A component with a `source` would load it, so it is only composed."""
    config = compose([f"{group}={name}"], tmp_path)
    if group == "pooler":
        side = fitting_side(spec.build(plain(config.model.pooler)))
        image = [f"model.encoder.image_size={16 * side}"]  # patches of 16 x 16 pixels
        config = compose([f"{group}={name}", *image], tmp_path)
    if not resolve(config.model.encoder._target_, "lightning_modules").reads_prompts:
        config = compose([f"{group}={name}", "pooler=average_2x2"], tmp_path)
    VideoLLMModule(plain(config.model), optimizer=list).check()


@pytest.mark.parametrize(("group", "name"), named(["optim", "trainer", "logger", "callbacks"]))
def test_optimisers_trainers_loggers_and_callbacks_are_made(group, name, compose, tmp_path):
    config = compose([f"{group}={name}"], tmp_path)
    if config.trainer.accelerator == "gpu":
        config.trainer.accelerator, config.trainer.devices = "cpu", 1
    assert instantiate(config.trainer, _convert_="all", logger=False).max_epochs == 1
    assert callable(instantiate(config.optim.optimizer))
    assert build_all(config.logger, "logger") or (group, name) == ("logger", "none")
    assert build_all(config.callbacks, "callbacks")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        *(("train", name) for name in RECIPES),
        *((program, "vniah_d_tiny") for program in sorted(PROGRAMS - {"train"})),
    ],
)
def test_every_experiment_composes_and_builds(name, program, recipe, compose, tmp_path):
    config = recipe(name)
    if program != "train":
        config = compose(RECIPES[name], tmp_path, program)
    instantiate(config.data, _convert_="all")
    build(config.module, "module")(model=plain(config.model)).check()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_its_command_and_what_it_gives(name, recipe):
    """A recipe without expected metrics says if it was measured, and gives published numbers."""
    experiment, _, scale = name.partition("-")
    text = (
        CONFIG_DIR / ("scale/tiny" if scale else "experiment") / f"{experiment}.yaml"
    ).read_text()
    command = re.search(r"^# (ropelab-train (?:-m )?experiment=.*)$", text, re.MULTILINE)
    assert command
    assert set(RECIPES[name]) <= set(command[1].split())
    if not scale:  # at the tiny scale these are the same for all: configs/scale/tiny.yaml
        assert "Hardware: " in text
        assert "Data: " in text
    expected = recipe(name).expected
    if expected:
        assert all(isinstance(value, float) for value in expected.values())
    else:
        assert "# Published: " in text
        assert re.search("(Not m|M)easured", text)


@pytest.mark.parametrize("name", SCALED)
def test_the_tiny_scale_has_the_stages_of_the_recipe(name, recipe):
    """No smaller classes: the tiny scale tests the classes that the recipe will use."""
    classes = [
        [config.module._target_, *(config.model[s]._target_ for s in STAGES if s in config.model)]
        for config in (recipe(name), recipe(f"{name}-tiny"))
    ]
    assert classes[0] == classes[1]


def test_words_of_the_command_line_win_over_the_tiny_scale(compose, tmp_path):
    words = ["experiment=ppllava_vicuna7b_video", "scale=tiny", "rotary=tad", "pooler=average"]
    words += ["llm=tiny", "trainer=ddp_sim", "trainer.max_epochs=7", "prepare=null"]
    config = compose(words, tmp_path)
    assert plain(config.model.pooler) == plain(compose(["pooler=average"], tmp_path).model.pooler)
    assert plain(config.model.rotary) == plain(compose(["rotary=tad"], tmp_path).model.rotary)
    assert config.model.llm.config.model_type == "qwen2"
    assert (config.trainer.devices, config.trainer.max_epochs, config.prepare) == (2, 7, None)


def test_the_tiny_scale_has_a_directory_of_its_own(compose, tmp_path):
    words = ["experiment=videorope_qwen2_7b", "rotary=mrope"]
    names = [compose([*words, f"scale={scale}"], tmp_path) for scale in ("full", "tiny")]
    assert [config.name for config in names] == ["videorope_qwen2_7b", "videorope_qwen2_7b_tiny"]
    assert [config.run_name for config in names] == ["mrope-seed0", "mrope-seed0"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_word(stage):
    for path in (CONFIG_DIR / stage).glob("*.yaml"):
        assert path.read_text().startswith(f"# @package model.{stage}\n"), path


def test_an_experiment_leaves_the_stages_to_the_command_line(compose, tmp_path):
    config = compose(["experiment=vniah_d_tiny", "pooler=none", "rotary=tad"], tmp_path)
    assert plain(config.model.pooler) == plain(compose(["pooler=none"], tmp_path).model.pooler)
    assert plain(config.model.rotary) == plain(compose(["rotary=tad"], tmp_path).model.rotary)


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("rotary=videorop", MissingConfigException, "videorope"),
        ("trainer.max_epoch=3", ConfigCompositionException, "trainer.max_epoch"),
        ("encodr=clip_tiny", ConfigCompositionException, "encodr"),
    ],
)
def test_a_typo_is_named(override, error, says, compose, tmp_path):
    with pytest.raises(error, match=says):
        compose([override], tmp_path)


def test_the_untracked_local_group_is_optional_and_has_the_last_word(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(
        "# @package _global_\npaths: {data: /scratch}\n"
    )
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        searched = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=vniah_d_tiny"]
        assert hydra.compose("train", searched).paths.data == "/scratch"
    root = CONFIG_DIR.parent
    git = ["git", "-C", str(root), "check-ignore", "configs/local/default.yaml"]
    assert subprocess.run(git, capture_output=True).returncode == 0


def test_a_file_of_a_package_is_found_or_how_to_get_it_is_said():
    node = OmegaConf.create({"there": "${installed:pytest,__init__.py}"})
    assert node.there == pytest.__file__
    for missing, says in (
        ("no_such_pkg,a", "pip install .* no-such-pkg"),
        ("pytest,a", "has no a"),
    ):
        with pytest.raises(InterpolationResolutionError, match=says):
            _ = OmegaConf.create({"a": f"${{installed:{missing}}}"}).a


def test_the_trainers_keys_have_lightnings_defaults():
    """Except those that the file sets on purpose."""
    file = OmegaConf.load(CONFIG_DIR / "trainer" / "default.yaml")
    ours: Any = OmegaConf.to_container(file, resolve=False)
    lightnings = {k: p.default for k, p in inspect.signature(lightning.Trainer).parameters.items()}
    chosen = {"_target_", "default_root_dir", "devices", "max_epochs", "precision"}
    chosen |= {"gradient_clip_val", "log_every_n_steps", "num_sanity_val_steps"}
    chosen |= {"enable_model_summary"}
    assert {k: v for k, v in ours.items() if k not in chosen} == {
        k: lightnings[k] for k in ours if k not in chosen
    }
    assert {f"trainer.{k}": ours[k] for k in ours if f"trainer.{k}" in NEW_KEYS} == NEW_KEYS


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("key", ["max_steps", "limit_val_batches", "check_val_every_n_epoch"])
def test_a_flag_of_the_trainer_needs_no_plus_but_may_have_one(key, plus, compose, tmp_path):
    config = compose(without_plus([f"{plus}trainer.{key}=7"]), tmp_path)
    assert config.trainer[key] == 7
