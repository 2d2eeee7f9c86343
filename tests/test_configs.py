"""Every option of every group composes, and what it names can be built."""

import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import import_module

import hydra
import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

import experiments.command.names  # noqa: F401 - registers the resolvers
from experiments import CONFIG_DIR
from experiments.run.compose import build, build_all, plain
from lightning_modules.training.instruct import VideoLLMModule

STAGES = ("encoder", "pooler", "rotary", "llm")
PROGRAMS = {path.stem for path in CONFIG_DIR.glob("*.yaml")}
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONFIG_DIR.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "hydra", "local")
)
GROUPS = {group: [name for g, name in OPTIONS if g == group] for group, _ in OPTIONS}
EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
TWINS = [name for name in EXPERIMENTS if name.removesuffix("_tiny") in set(EXPERIMENTS) - {name}]


def targets(node) -> list[str]:
    if isinstance(node, ListConfig):
        return [name for child in node for name in targets(child)]
    if not isinstance(node, DictConfig):
        return []
    own = [node["_target_"]] if node.get("_target_") else []
    return own + [name for key in node for name in targets(node._get_node(key))]


def words_of(n: int, groups: Iterable[str] = GROUPS) -> list[str]:
    """The n-th option of every group, since to compose takes longer than to look."""
    return [f"{group}={GROUPS[group][n % len(GROUPS[group])]}" for group in groups]


@pytest.fixture(scope="module")
def recipe(compose, tmp_path_factory):
    """`recipe(name)`: its config, composed once."""
    return cache(lambda name: compose([f"experiment={name}"], tmp_path_factory.mktemp("recipe")))


@pytest.mark.parametrize("n", range(max(map(len, GROUPS.values()))))
def test_every_option_composes_and_names_what_exists(n, compose, tmp_path):
    # With the program that has all groups, and a recipe that has a needle test.
    config = compose(["experiment=vniah_d_tiny", *words_of(n)], tmp_path, "plan")
    for target in targets(config):
        module, _, attribute = target.rpartition(".")
        assert hasattr(import_module(module), attribute), target


@pytest.mark.parametrize(("group", "name"), [o for o in OPTIONS if o[0] in STAGES])
def test_every_stage_fits_the_tiny_ones(group, name, compose, tmp_path):
    """A stage with a `source` would load it, and only composes."""
    config = compose([f"{group}={name}"], tmp_path)
    if group == "pooler" and config.model.pooler.get("kernel", [1, 1, 1])[1] == 3:
        image = ["model.encoder.image_size=96"]  # 6 x 6 patches
        config = compose([f"{group}={name}", *image], tmp_path)
    VideoLLMModule(plain(config.model), optimizer=list).check()


MADE = ("optim", "trainer", "logger", "callbacks")


@pytest.mark.parametrize("n", range(max(len(GROUPS[group]) for group in MADE)))
def test_optimisers_trainers_loggers_and_callbacks_are_made(n, compose, tmp_path):
    config = compose(words_of(n, MADE), tmp_path)
    if config.trainer.accelerator == "gpu":
        config.trainer.accelerator, config.trainer.devices = "cpu", 1
    assert instantiate(config.trainer, _convert_="all", logger=False).max_epochs == 1
    assert callable(instantiate(config.optim.optimizer))
    assert build_all(config.logger, "logger") or "logger=none" in words_of(n, MADE)
    assert build_all(config.callbacks, "callbacks")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        *(("train", name) for name in EXPERIMENTS),
        *((program, "vniah_d_tiny") for program in sorted(PROGRAMS - {"train"})),
    ],
)
def test_every_experiment_composes_and_builds(name, program, recipe, compose, tmp_path):
    config = recipe(name)
    if program != "train":
        config = compose([f"experiment={name}"], tmp_path, program)
    instantiate(config.data, _convert_="all")
    build(config.module, "module")(model=plain(config.model)).check()
    text = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    assert "# ropelab-" in text, "a recipe states its command"


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_stages_of_its_recipe(name, recipe):
    """Smaller classes stand nowhere: the twin tries out what the recipe will run."""
    twin, whole = recipe(name), recipe(name.removesuffix("_tiny"))
    classes = [
        [config.module._target_, *(config.model[s]._target_ for s in STAGES if s in config.model)]
        for config in (twin, whole)
    ]
    assert classes[0] == classes[1]


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
