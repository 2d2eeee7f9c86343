"""Ends a Hydra program with one line if its command names keys or options that do not exist."""

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from hydra.errors import CompactHydraException, ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments import CONFIG_DIR
from experiments.command.nearest import ALIKE, dotted, nearest
from experiments.command.old_words import NEW_WORDS, without_plus
from experiments.private.hydra import report_first, root_of
from experiments.run.process import fail, process_rank

_UNKNOWN = re.compile(
    r"Could not override '(?P<key>.*)'\.\nTo append to your config use \+(?P<word>.*)"
)
_THERE = re.compile(
    r"Could not append to config\. An item is already at '(?P<key>.*)'\.\n"
    r".*\nOr add a second .*: '\+(?P<word>\+.*)'"
)
_NO_OPTION = re.compile(
    r"(?:In '(?P<where>[^']*)': )?Could not find '(?P<group>.*)/(?P<option>[^/]*)'\n\n"
    r"Available options in .*:\n(?P<known>.*)\nConfig search path:.*",
    re.DOTALL,
)
_NO_TINY = re.compile(r".*Could not load 'scale/tiny/(?P<recipe>.*)'\.\n.*", re.DOTALL)

_NO_FILE = re.compile(
    r"(?:In '(?P<where>[^']*)': )?Could not load '(?P<group>[^']*)/(?P<option>[^/']*)'\.\n.*",
    re.DOTALL,
)


def hydra_errors_in_one_line(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the result of `hydra.main`. `HYDRA_FULL_ERROR=1` still shows tracebacks."""

    def guarded(*arguments: Any) -> Any:
        sys.argv[1:] = without_plus(sys.argv[1:])
        with report_first(_in_one_line):
            return main(*arguments)

    return functools.update_wrapper(guarded, getattr(main, "__wrapped__", main))


def _in_one_line(func: Callable[[], Any]) -> Any:
    try:
        return func()
    except (CompactHydraException, ValueError) as error:
        told = _describe_null(error) if isinstance(error, ValueError) else describe(error)
        if told is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(told, process_rank())


def _describe_null(error: ValueError) -> str | None:
    """Returns the message for `GROUP=null`, which Hydra refuses with a traceback, else None."""
    words = [word for word in sys.argv[1:] if word.endswith("=null")]
    if not (words and str(error).startswith("Config group override must be")):
        return None
    group = words[0].partition("=")[0]
    return (
        f"error: {words[0]}: a group takes one of its options; leave {words[0]} out, or write "
        f"~{group} for none"
    )


def describe(error: CompactHydraException) -> str:
    """Returns the error message: one line, or several if a multirun lists its failed jobs."""
    text = str(error).strip()
    if not isinstance(error, (ConfigCompositionException, OverrideParseException)):
        return text
    if (told := _describe_option(text)) is not None:
        return told
    cause = error.__cause__
    unknown = _UNKNOWN.fullmatch(text)
    if unknown and isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return f"error: {_describe_key(unknown['key'], unknown['word'], _root_beside(cause))}"
    if there := _THERE.match(text):
        return f"error: {there['word']}: {there['key']} is there already: write {there['word'][1:]}"
    if isinstance(cause, OmegaConfBaseException):
        text = f"{text}: {str(cause).strip().splitlines()[0]}"
    text = text.partition("\nConfig search path:")[0]  # ropelab-train --info searchpath shows it
    return f"error: {' '.join(text.split())}"


def _describe_key(key: str, word: str, root: dict[Any, Any]) -> str:
    """Returns the message for a key that is not there.

    It suggests `+` only for arguments of an object; nothing would read any other key.
    """
    groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()]
    found = nearest(key, [*dotted(root), *(groups if "." not in key else [])])
    if found in groups:
        found = f"{found}{word[len(key) :]}"
    told = f"{word} sets a key that is not there"
    if found:
        told += f": did you mean {found}?"
    section: Any = root
    for part in key.split(".")[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict) and (target := section.get("_target_")):
        return f"{told}{'' if found else ':'} +{word} adds it, if {target} has this argument"
    return told if found else f"{told}: ropelab-train --cfg job shows every key"


def _describe_option(text: str) -> str | None:
    """Returns the message for a word that has gone or is misspelt, or a recipe without `scale`."""
    if missing := _NO_OPTION.fullmatch(text):
        group, option = missing["group"], missing["option"]
        word = f"{group}={option}"
        if word in NEW_WORDS:
            return f"error: {word} is now {NEW_WORDS[word]}"
        known = missing["known"].split()
        return f"error: {_describe_choice(group, option, known, missing['where'])}"
    if missing := _NO_TINY.fullmatch(text):
        recipes = sorted(path.stem for path in (CONFIG_DIR / "scale" / "tiny").glob("*.yaml"))
        recipe = missing["recipe"].replace("None", "null")
        return (
            f"error: experiment={recipe} has no scale=tiny: leave it out, or choose a recipe that "
            f"has it ({', '.join(recipes)})"
        )
    if missing := _NO_FILE.fullmatch(text):
        group, option = missing["group"], missing["option"]
        known = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
        if known:
            return f"error: {_describe_choice(group, option, known, missing['where'])}"
    return None


def _describe_choice(group: str, option: str, known: Sequence[str], where: str | None) -> str:
    """Returns the message for an option that is not there, with the nearest one and all others.

    Recipes of one's own lie in the group experiment/local, but their word is experiment=local/NAME.

    Args:
        where: name of the file that chooses it, as Hydra tells it.
    """
    if group.partition("/")[0] == "experiment":
        if group == "experiment/local":
            group, option = "experiment", f"local/{option}"
        recipes = CONFIG_DIR / "experiment"
        own = [f"local/{path.stem}" for path in sorted((recipes / "local").glob("*.yaml"))]
        known = [*sorted(path.stem for path in recipes.glob("*.yaml")), *own]
    word = f"{group}={option}"
    chosen_in = f" (in {where}.yaml)" if where and where.startswith("experiment/") else ""
    others = ", ".join(known)
    longer = [name for name in known if option and name.startswith(option)]
    if like := get_close_matches(option, known, 1, ALIKE) or longer:
        return f"{word}{chosen_in} is not there: did you mean {group}={like[0]}? ({others})"
    return f"{word}{chosen_in} is not there: choose one of {others}"


def _root_beside(error: OmegaConfBaseException) -> dict[Any, Any]:
    """Returns the config in which a key was not found."""
    if error.parent_node is None:
        return {}
    root: Any = OmegaConf.to_container(root_of(error.parent_node), throw_on_missing=False)
    return root
