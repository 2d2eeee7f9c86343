"""ropelab-new: the recipe that it writes is found by every program, and nothing is overwritten."""

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from experiments import new


@pytest.fixture(name="recipes")
def recipes_fixture(tmp_path, monkeypatch):
    """A folder `experiment/` of recipes outside this checkout."""
    recipes = tmp_path / "configs" / "experiment"
    recipes.mkdir(parents=True)
    for path in new.RECIPES.glob("*.yaml"):
        (recipes / path.name).write_text(path.read_text())
    monkeypatch.setattr(new, "RECIPES", recipes)
    monkeypatch.setattr(new.write_recipe, "__defaults__", (recipes,))
    return recipes


def test_every_recipe_can_be_copied_and_means_the_same(recipes, compose, tmp_path):
    for path in sorted(recipes.glob("*.yaml")):
        name = path.stem
        assert new.main(["mine-" + name, "--like", name]) == 0
        text = (recipes / "local" / f"mine-{name}.yaml").read_text()
        assert f"experiment={name}" not in text.replace(f"local/mine-{name}", "")
        kept = {k: v for k, v in yaml.safe_load(path.read_text()).items() if "expected" not in k}
        assert yaml.safe_load(text) == kept | {"name": f"mine-{name}"}


def test_programs_find_it_by_its_word(recipes, compose, tmp_path):
    assert new.main(["mine"]) == 0
    search = f"hydra.searchpath=[file://{recipes.parent}]"
    for program in ("train", "evaluate", "plan"):
        words = ["experiment=local/mine", "data.train=shards/", "data.val=null", search]
        config = compose(words, tmp_path, program)
        assert config.name == "mine"
        assert HydraConfig.get().runtime.choices["experiment"] == "local/mine"
        assert OmegaConf.select(config, "tuning.lora.rank")


@pytest.mark.parametrize("name", ["null", "1e5", "2024", "on"])
def test_a_name_that_yaml_reads_as_something_else_is_quoted(name, recipes, compose, tmp_path):
    assert new.main([name]) == 0
    search = f"hydra.searchpath=[file://{recipes.parent}]"
    words = [f"experiment=local/{name}", "data.train=shards/", "data.val=null", search]
    assert compose(words, tmp_path).name == name


def test_it_never_overwrites(recipes, capsys):
    assert new.main(["mine"]) == 0
    path = recipes / "local" / "mine.yaml"
    path.write_text("my own")
    capsys.readouterr()
    assert new.main(["mine"]) == 2
    assert "is there already; choose another name, or remove it\n" in capsys.readouterr().err
    assert path.read_text() == "my own"


@pytest.mark.parametrize("name", ["", "a b", "../mine", "a/b", "-x=", "a.b", "a,b"])
def test_a_name_that_is_no_word_is_refused(name, recipes, capsys):
    assert new.main(["--", name]) == 2
    assert "use letters, digits, - and _" in capsys.readouterr().err
    assert not (recipes / "local").exists()


def test_an_unknown_recipe_is_one_line_with_the_known_ones(recipes, capsys):
    assert new.main(["mine", "--like", "vniah"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no recipe 'vniah'; choose one of ")
    assert error.count("\n") == 1
    assert "vniah_d_tiny" in error
