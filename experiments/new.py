"""ropelab-new: writes a recipe of your own, as a copy of a recipe that works.

ropelab-new mine
ropelab-new mine --like vniah_d_tiny
ropelab-train experiment=local/mine

The recipe lies in configs/experiment/local/. Git ignores this folder, and every program reads it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from experiments import CONFIG_DIR
from experiments.run.process import run_alone

RECIPES = CONFIG_DIR / "experiment"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def main(arguments: Sequence[str] | None = None) -> int:
    run_alone("ropelab-new")
    options = _parser().parse_args(arguments)
    try:
        path = write_recipe(options.name, options.like)
    except (ValueError, OSError) as error:  # errors that the user can fix, in one line
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}\nedit it, then: ropelab-train experiment=local/{options.name}")
    return 0


def write_recipe(name: str, like: str, recipes: Path = RECIPES) -> Path:
    """Writes `local/NAME.yaml`, a copy of the recipe `like` under another name. Returns its path.

    Args:
        recipes: folder of the recipes.

    Raises:
        ValueError: the name is unusable or taken, or there is no recipe `like`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be a name; use letters, digits, - and _")
    known = sorted(str(path.relative_to(recipes).with_suffix("")) for path in _all(recipes))
    if like not in known:
        raise ValueError(f"no recipe {like!r}; choose one of {', '.join(known)}")
    path = recipes / "local" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    text = _renamed((recipes / f"{like}.yaml").read_text(), name, like)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} is there already; choose another name, or remove it") from None
    return path


def _all(recipes: Path) -> list[Path]:
    return [*recipes.glob("*.yaml"), *recipes.glob("local/*.yaml")]


def _renamed(text: str, name: str, like: str) -> str:
    """Returns the text of a recipe under a new name, without its measured result."""
    text = re.sub(rf"experiment={re.escape(like)}(?![\w/-])", f"experiment=local/{name}", text)
    plain = isinstance(OmegaConf.create(f"name: {name}").name, str)
    own = name if plain else f'"{name}"'  # null and 1e5 are names too
    text = re.sub(r"^name: .*$", f"name: {own}", text, flags=re.M)
    return re.sub(r"^expected(_within)?:.*\n", "", text, flags=re.M)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ropelab-new", description="Writes a recipe of your own: experiment=local/NAME."
    )
    parser.add_argument("name", metavar="NAME", help="letters, digits, - and _")
    parser.add_argument(
        "--like", default="my_videos", metavar="RECIPE", help="the recipe to copy (my_videos)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
