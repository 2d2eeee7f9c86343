"""Decides whether a deprecation warning comes from our code or from a library.

A deprecation warning fails a test if our code makes the deprecated call. If a library makes it, the
warning is only listed. pytest's filters distinguish the two by the module that a warning is
attributed to, but libraries often attribute a warning to the wrong frame:

- They leave `stacklevel` at 1, which is the deprecated function itself and not its caller.
- A function between the caller and the deprecated function only passes the arguments on, such as
  `torch.nn.Module.__call__` or a decorator.

`blame_callers` replaces `warnings.warn` and attributes such warnings to the real caller. It must
run before libraries are imported, because some of them keep a reference to `warnings.warn`.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

_TESTS = Path(__file__).parents[1]
_PACKAGES = ("lightning_modules", "datamodules", "experiments", "benchmarks", "tests")
_ORIGINAL = warnings.warn


def filters() -> list[str]:
    """Returns pytest filters; later ones win. Our warnings are errors, others are listed."""
    return [f"{action}::{kind.__name__}:{module}" for action, kind, module in _rules()]


def blame_callers() -> None:
    """Attributes deprecation warnings to the frame that makes the deprecated call.

    Also sets the warning filters now, because pytest reads those of `filters` after conftest.py.
    """
    warnings.warn = _warn
    for action, kind, module in _rules():
        warnings.filterwarnings(action, category=kind, module=module)


def _rules() -> list[tuple[Literal["default", "error"], type[Warning], str]]:
    helpers = sorted(path.stem for path in _TESTS.glob("*.py"))
    ours = rf"({'|'.join([*_PACKAGES, *helpers])})(\.|\Z)"
    listed = [("default", kind, "") for kind in DEPRECATIONS]
    return listed + [("error", kind, ours) for kind in DEPRECATIONS]


def _warn(
    message: str | Warning,
    category: type[Warning] | None = None,
    stacklevel: int = 1,
    source: Any = None,
    **options: Any,
) -> None:
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    frame = None
    if issubclass(kind, DEPRECATIONS) and not options:
        frame = _blamed(sys._getframe(1), stacklevel)
    if frame is None:  # + 1 for the frame of this function, which the caller does not count
        _ORIGINAL(message, category, stacklevel + 1, source, **options)
        return
    warnings.warn_explicit(
        message,
        kind,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__", "<unknown>"),
        frame.f_globals.setdefault("__warningregistry__", {}),
        source=source,
    )


def _blamed(warning: FrameType, stacklevel: int) -> FrameType | None:
    """Returns the frame that makes the deprecated call, or None at the end of the stack.

    Args:
        warning: the frame that calls `warnings.warn`.
        stacklevel: the value from that call; 1 is read as 2.
    """
    frames = [frame for frame in _outwards(warning) if not _is_import_machinery(frame)]
    place = max(stacklevel, 2) - 1
    while place + 1 < len(frames):
        outer = place + _is_part(frames[place], frames[place + 1])
        if not _hands_on(frames[outer], frames[place - 1]):
            break
        place = outer + 1
    return frames[place] if place < len(frames) else None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_import_machinery(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(("<frozen importlib", importlib.__file__))


def _is_part(inner: FrameType, outer: FrameType) -> bool:
    """Returns whether `inner` runs a function that is defined inside the one that `outer` runs."""
    return any(constant is inner.f_code for constant in outer.f_code.co_consts)


def _hands_on(outer: FrameType, inner: FrameType) -> bool:
    """Returns whether `outer` is `f(*args, **kwargs)` and calls `inner` with its own arguments.

    If both are such functions in one file, the arguments may differ: the hooks of a
    `torch.nn.Module` may change them between `__call__` and `forward`.
    """
    if not _takes_anything(outer.f_code):
        return False
    if _takes_anything(inner.f_code) and inner.f_code.co_filename == outer.f_code.co_filename:
        return True
    received = {id(value) for value in _variable_arguments(outer)}
    given = {id(value) for value in _all_arguments(inner)}
    return received <= given


def _takes_anything(code: CodeType) -> bool:
    both = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return code.co_flags & both == both


def _variable_arguments(frame: FrameType) -> list[Any]:
    named = _count_named(frame.f_code)
    args, kwargs = frame.f_code.co_varnames[named : named + 2]
    return [*frame.f_locals.get(args, ()), *frame.f_locals.get(kwargs, {}).values()]


def _all_arguments(frame: FrameType) -> list[Any]:
    code, values = frame.f_code, frame.f_locals
    found = [values[name] for name in code.co_varnames[: _count_named(code)] if name in values]
    place = _count_named(code)
    if code.co_flags & inspect.CO_VARARGS:
        found += values.get(code.co_varnames[place], ())
        place += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        found += values.get(code.co_varnames[place], {}).values()
    return found


def _count_named(code: CodeType) -> int:
    return code.co_argcount + code.co_kwonlyargcount
