"""Deprecation warnings: who made the call, and that none of our calls makes one."""

import ctypes
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.deprecations import DEPRECATIONS

#: A library that deprecates a function, in the ways that libraries use.
OLD_LIBRARY = """
import contextlib
import functools
import warnings

import torch

CATEGORY = DeprecationWarning


def careless(value=0, **options):
    warnings.warn("careless is deprecated", CATEGORY)


def careful(value=0, **options):
    warnings.warn("careful is deprecated", CATEGORY, stacklevel=2)


def hand_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def renamed_argument(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "old" in kwargs:
            kwargs["new"] = kwargs.pop("old")
            warnings.warn("old is deprecated", CATEGORY, stacklevel=2)
        return function(*args, **kwargs)

    return wrapper


decorated = torch.no_grad()(hand_on(careful))


class Layer(torch.nn.Module):
    @renamed_argument
    def forward(self, value=0, new=None):
        return value


layer = Layer()
hooked = Layer()
hooked.register_forward_pre_hook(
    lambda _, args, kwargs: (args, {"old": list(kwargs["old"])}), with_kwargs=True
)
hooked.register_forward_hook(lambda module, args, output: None, always_call=True)


def own_doing(*args, **kwargs):
    careful(1)
"""

#: Another library that calls it.
CALLER = """
import old_library


def call(name, *args, **kwargs):
    prepared = [object()]
    getattr(old_library, name)(prepared, old=prepared)
"""

NAMES = ("careless", "careful", "decorated", "layer", "hooked")


@pytest.fixture(params=DEPRECATIONS, ids=lambda category: category.__name__)
def libraries(request, tmp_path, monkeypatch):
    for name, text in {"old_library": OLD_LIBRARY, "caller": CALLER}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    import caller
    import old_library

    old_library.CATEGORY = request.param
    yield old_library, caller
    del sys.modules["old_library"], sys.modules["caller"]


@pytest.mark.parametrize("name", NAMES)
def test_our_deprecated_call_fails(libraries, name):
    old_library, _ = libraries
    with pytest.raises(old_library.CATEGORY, match="deprecated"):
        getattr(old_library, name)([0], old=[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_deprecated_call_of_another_library_is_only_listed(libraries, name):
    old_library, caller = libraries
    with warnings.catch_warnings(record=True) as seen:
        caller.call(name, 1)
    assert [warning.category for warning in seen] == [old_library.CATEGORY]
    assert seen[0].filename == caller.__file__


def test_a_library_that_deprecates_what_it_uses_itself(libraries):
    old_library, _ = libraries
    with warnings.catch_warnings(record=True) as seen:
        old_library.own_doing([0], old=[1])
    assert [warning.filename for warning in seen] == [old_library.__file__]


@pytest.mark.parametrize("stacklevel", [1, 2])
def test_an_import_is_a_call_of_the_one_who_imports(tmp_path, monkeypatch, stacklevel):
    text = f"import warnings\nwarnings.warn('old', DeprecationWarning, stacklevel={stacklevel})\n"
    (tmp_path / "old_module.py").write_text(text)
    (tmp_path / "importer.py").write_text("import old_module\n")
    for name in ("old_module", "importer"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeprecationWarning, match="old"):
        importlib.import_module("old_module")
    with warnings.catch_warnings(record=True) as seen:
        importlib.import_module("importer")
    assert [Path(warning.filename).name for warning in seen] == ["importer.py"]


def warn_from_c() -> None:
    """A deprecation warning of compiled code goes to the Python function that calls it."""
    warn = ctypes.pythonapi.PyErr_WarnEx
    warn.argtypes = [ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t]
    warn(DeprecationWarning, b"from C", 1)  # ctypes raises what it has set


def test_compiled_code_is_called_by_us():
    with pytest.raises(DeprecationWarning, match="from C"):
        warn_from_c()


def test_other_warnings_stay_errors_wherever_they_come_from():
    module = ModuleType("stranger")
    exec("import warnings\ndef f(): warnings.warn('careful', UserWarning)", module.__dict__)
    with pytest.raises(UserWarning, match="careful"):
        module.f()


def test_other_warnings_name_the_place_that_their_author_chose():
    with pytest.warns(UserWarning, match="here") as seen:
        warnings.warn("here", UserWarning)  # noqa: B028
    assert seen[0].filename == __file__


def test_one_exception_can_still_be_made():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "known")
        warnings.warn("known", DeprecationWarning)  # noqa: B028 - as libraries do it
    with pytest.deprecated_call(match="asked for"):
        warnings.warn("asked for", DeprecationWarning)  # noqa: B028
