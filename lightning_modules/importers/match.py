"""Matches stored tensors to parameters; unmatched names on either side are an error."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Maximum number of names in an error message.
_SHOWN = 3


class Rule(NamedTuple):
    """A renaming rule: replaces the prefix `pattern` (a regular expression) of a name by `ours`.

    `take` slices or reshapes the stored tensor.
    """

    pattern: str
    ours: str
    take: Callable[[Tensor], Tensor] | None = None


class Allowed(NamedTuple):
    """Globs of names that may stay unmatched: stored names, and parameters of the model.

    `key` is the setting that a user changes, with `{}` for `unused` or `unfilled`.
    """

    unused: Sequence[str] = ()
    unfilled: Sequence[str] = ()
    key: str = "allow_{}"


@dataclass
class Match:
    """Stored tensors by parameter name, and all unmatched names."""

    values: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # parameter -> stored name
    on_purpose: list[str] = field(default_factory=list)  # stored names known to be unneeded
    unused: list[str] = field(default_factory=list)
    unfilled: list[str] = field(default_factory=list)


def match(
    stored: Mapping[str, Tensor],
    module: nn.Module,
    rules: Sequence[Rule],
    on_purpose: Sequence[str] = (),
) -> Match:
    """Matches every stored tensor to a parameter; copies nothing yet.

    The first rule that fits a stored name is used. `on_purpose` are globs of stored names that may
    stay unmatched. Of tied parameters, one is enough.

    Raises:
        ValueError: a tensor and its parameter differ in shape, two tensors match one parameter, or
            tensors of tied parameters differ.
    """
    parameters = module.state_dict(keep_vars=True)
    found = Match()
    for name, tensor in stored.items():
        ours, take = _rename(name, rules)
        if ours in found.names:
            raise ValueError(f"{found.names[ours]} and {name} would both become {ours}")
        if ours in parameters:
            found.names[ours] = name
            found.values[ours] = tensor if take is None else take(tensor)
        else:
            purpose = any(fnmatchcase(name, glob) for glob in on_purpose)
            (found.on_purpose if purpose else found.unused).append(name)
    filled = {id(parameters[name]) for name in found.values}
    found.unfilled = [name for name, value in parameters.items() if id(value) not in filled]
    _compare_shapes(found, parameters)
    _compare_tied(found, parameters)
    return found


def check(found: Match, allowed: Allowed, where: str) -> None:
    """Checks that all unmatched names are allowed.

    Raises:
        ValueError: some are not; one line with the counts, the first names and the setting that
            would allow them.
    """
    unused = _not_in(found.unused, allowed.unused)
    unfilled = _not_in(found.unfilled, allowed.unfilled)
    wrong = []
    if unused:
        key = allowed.key.format("unused")
        wrong.append(
            f"{len(unused)} of its keys have no place in the model ({_some(unused)}; {key})"
        )
    if unfilled:
        key = allowed.key.format("unfilled")
        wrong.append(
            f"{len(unfilled)} parameters of the model are not in it ({_some(unfilled)}; {key})"
        )
    if wrong:
        raise ValueError(f"{where} does not fit: {', and '.join(wrong)} would allow that")


def adopt(module: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replaces the parameters of a module on the meta device by these tensors.

    Tensors that already have the dtype are not copied, so they stay on disk until they are used.
    """
    parameters = module.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    for name, value in values.items():
        former = parameters[name]
        whole = value.untyped_storage().nbytes() == value.nbytes
        kept = value.to(dtype) if whole else value.to(dtype, copy=True).contiguous()
        parameter = nn.Parameter(kept, requires_grad=former.requires_grad)
        for alias in aliases[id(former)]:
            path, _, leaf = alias.rpartition(".")
            setattr(module.get_submodule(path), leaf, parameter)


@torch.no_grad()
def copy(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copies the tensors into the parameters of a module that is in memory."""
    parameters = module.state_dict(keep_vars=True)
    for name, value in values.items():
        parameters[name].copy_(value)


def _rename(name: str, rules: Sequence[Rule]) -> tuple[str | None, Callable | None]:
    for pattern, ours, take in rules:
        renamed, count = re.subn(f"^{pattern}", ours, name)
        if count:
            return renamed, take
    return None, None


def _compare_shapes(found: Match, parameters: Mapping[str, Tensor]) -> None:
    wrong = [name for name, value in found.values.items() if value.shape != parameters[name].shape]
    if wrong:
        name = wrong[0]
        stored, ours = tuple(found.values[name].shape), tuple(parameters[name].shape)
        raise ValueError(
            f"{len(wrong)} of {len(found.values)} tensors have a different shape in the model: "
            f"{found.names[name]} is {stored}, but {name} is {ours}"
        )


def _compare_tied(found: Match, parameters: Mapping[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name, value in found.values.items():
        other = first.setdefault(id(parameters[name]), name)
        if other != name and not torch.equal(value, found.values[other]):
            raise ValueError(
                f"{found.names[name]} and {found.names[other]} differ, but the config ties them "
                "(tie_word_embeddings)"
            )


def _not_in(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, glob) for glob in globs)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
