"""Imports what users name as `module:function`, `module:Class` or `path/to/file.py:function`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def import_callable(path: str) -> Callable[..., Any]:
    """The function or class at an import path; modules are also looked up in the working directory.

    Raises:
        ValueError: there is no such module, file or name, it is not callable, or importing it raises.
    """
    place, _, name = path.rpartition(":")
    if not (place and name):
        raise ValueError(f"{path!r} is not an import path: write module:function or path/to/file.py:function")
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else _module_named(place)
    except Exception as error:  # boundary: the user's module may raise anything when it is imported
        raise ValueError(f"cannot import {place} for {path!r}: {one_line(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{place} has no {name!r}" if found is None else f"{path!r} is not callable")
    function: Callable[..., Any] = found
    return function


def absolute_import_path(path: str) -> str:
    """The same import path with an absolute file name, so that it still resolves after a chdir."""
    place, _, name = path.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if place.endswith(".py") else path


def one_line(error: Exception) -> str:
    """An exception's type and message in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _module_named(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a console script's sys.path lacks it
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _module_of(file: Path) -> ModuleType:
    name = f"_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # of a name that ends in .py
    assert spec.loader is not None
    if str(file.parent.resolve()) not in sys.path:  # for imports of modules beside it
        sys.path.append(str(file.parent.resolve()))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
