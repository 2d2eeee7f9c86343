"""Ends a Hydra program with one line if its command names keys or options that do not exist."""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

from hydra.errors import CompactHydraException, ConfigCompositionException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments import CONFIG_DIR
from experiments.command.old_words import NEW_WORDS, without_plus
from experiments.private.hydra import report_first, root_of
from experiments.run.process import fail, process_rank

_UNKNOWN = re.compile(r"Could not override '(?P<key>.*)'\.\nTo append to your config use \+(.*)")
_NO_OPTION = re.compile(
    r".*Could not find '(?P<group>.*)/(?P<option>[^/]*)'\n\nAvailable options in .*:\n"
    r"(?P<known>.*)\nConfig search path:.*",
    re.DOTALL,
)
_NO_TINY = re.compile(r".*Could not load 'scale/tiny/(?P<recipe>.*)'\.\n.*", re.DOTALL)

#: Least similarity of two keys, and of their last parts, for a spelling suggestion. 1 is equal.
_ALIKE = 0.75


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
        key, word = unknown.groups()
        known = list(_keys_beside(cause))
        nearest = _nearest(key, known)
        meant = f"did you mean {nearest}, or " if nearest else ""
        return f"error: {word} sets a key that is not there: {meant}add it with +{word}"
    if isinstance(cause, OmegaConfBaseException):
        text = f"{text}: {str(cause).strip().splitlines()[0]}"
    text = text.partition("\nConfig search path:")[0]  # ropelab-train --info searchpath shows it
    return f"error: {' '.join(text.split())}"


def _describe_option(text: str) -> str | None:
    """Returns the message for a word that has gone or is misspelt, or a recipe without `scale`."""
    if missing := _NO_OPTION.fullmatch(text):
        group, option, known = missing["group"], missing["option"], missing["known"].split()
        word = f"{group}={option}"
        if word in NEW_WORDS:
            return f"error: {word} is now {NEW_WORDS[word]}"
        if nearest := get_close_matches(option, known, 1, _ALIKE):
            others = ", ".join(known)
            return f"error: {word} is not there: did you mean {group}={nearest[0]}? ({others})"
        return None
    if missing := _NO_TINY.fullmatch(text):
        recipes = sorted(path.stem for path in (CONFIG_DIR / "scale" / "tiny").glob("*.yaml"))
        recipe = missing["recipe"].replace("None", "null")
        return (
            f"error: experiment={recipe} has no scale=tiny: leave it out, or choose a recipe that "
            f"has it ({', '.join(recipes)})"
        )
    return None


def _nearest(key: str, known: list[str]) -> str | None:
    """Returns the known key with the most similar spelling, else one with the same last part."""
    last = key.rpartition(".")[2]
    ends = {other: other.rpartition(".")[2] for other in known}
    same_end = [other for other, end in ends.items() if end == last]
    like_end = [other for other, end in ends.items() if get_close_matches(last, [end], 1, _ALIKE)]
    found = get_close_matches(key, like_end, 1, _ALIKE) or get_close_matches(key, same_end, 1, 0.0)
    return found[0] if found else None


def _keys_beside(error: OmegaConfBaseException) -> Iterator[str]:
    """Yields the dotted keys of the config in which a key was not found."""
    if error.parent_node is not None:
        root = OmegaConf.to_container(root_of(error.parent_node), throw_on_missing=False)
        yield from (key for key in _keys(root) if key.partition(".")[0] != "hydra")


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield f"{prefix}{name}"
            yield from _keys(child, f"{prefix}{name}.")
