"""A closed tree of settings, read from YAML into frozen dataclasses.

An unknown key is a mistake that names itself and the nearest known key. Scalars are checked too
(`threshold: "0.6"` is a mistake, not a number). Every mistake is a ValueError of one sentence. A key that is a keyword
of Python has an underscore behind it in its dataclass: the field of `from` is `from_`.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import math
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # keys merged in by `<<` may be overridden
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ValueError(f"line {key_node.start_mark.line + 1}: a key must be plain text")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: the key {key!r} is written twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """A file's YAML value. Raises ValueError if the file can't be read or is not valid."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"can't read {path}: {reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def build(kind: Any, value: Any, where: str, default: Any = None) -> Any:
    """Checks `value` against the annotation `kind` and builds it.

    Args:
        where: the place, for messages.
        default: a section's default; keys that `value` lacks are taken from it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where, default)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise ValueError(f"{where} is {value!r}; write one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return build(next(option for option in arguments if option is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {kind_of(value)}; write a list")
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return _mapping(arguments[1], value, where)
    return _scalar(kind, value, where)


def _mapping(kind: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {kind_of(value)}; write a mapping from names")
    for name in value:
        if not isinstance(name, str):  # YAML reads on, no and 7 as something else
            raise ValueError(f"{where} has the name {name!r}, which YAML takes for {kind_of(name)}; put it in quotes")
    return {name: build(kind, item, f"{where}.{name}") for name, item in value.items()}


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {kind_of(value)}; write {KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; write a finite number")
    return value


def _section(kind: Any, value: Any, where: str, default: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the config'} is {kind_of(value)}; write a mapping")
    fields = {key_of(item.name): item for item in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in fields:
            path = f"{where}.{name}" if where else str(name)
            similar = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.6)
            hint = f"did you mean {similar[0]!r}?" if similar else f"known here: {', '.join(fields)}"
            raise ValueError(f"unknown key {path!r}; {hint}")
    built = {}
    for name, item in fields.items():
        path = f"{where}.{name}" if where else name
        if name in value:
            known = item.default_factory() if callable(item.default_factory) else None
            built[item.name] = build(hints[item.name], value[name], path, known)
        elif default is not None:
            built[item.name] = getattr(default, item.name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path!r} is missing")
    return kind(**built)


def key_of(field: str) -> str:
    """The key of a dataclass's field in YAML."""
    return field.removesuffix("_") if keyword.iskeyword(field.removesuffix("_")) else field


KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def kind_of(value: Any) -> str:
    """What a YAML value is, for messages."""
    if value is None:
        return "empty"
    names = {dict: "a mapping", list: "a list", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(type(value), f"the text {value!r}" if isinstance(value, str) else f"a {type(value).__name__}")


def plain(value: Any) -> Any:
    """A tree as mappings, lists and scalars, for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {key_of(item.name): plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def at_least(value: float, floor: float, where: str) -> None:
    if not value >= floor:
        raise ValueError(f"{where} is {value:g} and must be at least {floor:g}")


def within(value: float, low: float, high: float, where: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{where} is {value:g} and must be between {low:g} and {high:g}")
