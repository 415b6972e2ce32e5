"""The rules by name, and how a rule is made of its settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from depo_gateway.training.rewards.import_path import import_callable
from depo_gateway.training.rl.selection_config import POLICY, SPREAD, SelectionConfig
from depo_gateway.training.rl.selectors.band import Band
from depo_gateway.training.rl.selectors.greso import Greso
from depo_gateway.training.rl.selectors.in_order import InOrder
from depo_gateway.training.rl.selectors.informative import Informative
from depo_gateway.training.rl.selectors.mopps import Mopps
from depo_gateway.training.rl.selectors.oracle import Oracle
from depo_gateway.training.rl.selectors.polaris import Polaris
from depo_gateway.training.rl.selectors.rule import SelectionRule

RULES: dict[str, type[SelectionRule]] = {
    "off": InOrder,
    "band": Band,
    "informative": Informative,
    "greso": Greso,
    "mopps": Mopps,
    "polaris": Polaris,
    "oracle": Oracle,
}


def rule_class(name: str) -> type[SelectionRule]:
    """The class of a rule by its name or import path. Raises ValueError if there is no such rule."""
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        raise ValueError(
            f"the selection rule {name!r} is unknown; use one of {', '.join(RULES)}, or a class of yours as "
            "module:Class or file.py:Class"
        )
    found = import_callable(name)
    if not (isinstance(found, type) and issubclass(found, SelectionRule)):
        raise ValueError(f"{name} is not a SelectionRule (depo_gateway.training.rl.selectors.rule)")
    if found.heads not in ((), (POLICY,), (POLICY, SPREAD)):
        raise ValueError(f'{name} has heads {found.heads}; they must be (), ("policy",) or ("policy", "spread")')
    return found


def rule_of(config: SelectionConfig) -> SelectionRule:
    """The rule that the settings describe. Raises ValueError for an unknown rule or options that it does not take."""
    kind = rule_class(config.rule)
    parameters = inspect.signature(kind).parameters
    options = {name: parameter for name, parameter in parameters.items() if name not in kind.settings}
    for name in config.options:
        if name not in options:
            raise ValueError(f"the selection rule {config.rule} has no option {name!r}{_instead(name, options)}")
    for name, parameter in options.items():
        if parameter.default is parameter.empty and name not in config.options:
            raise ValueError(f"the selection rule {config.rule} requires the option {name!r}")
    return kind(**{name: getattr(config, name) for name in kind.settings}, **config.options)


def _instead(name: str, options: Iterable[str]) -> str:
    known = list(options)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}" if known else ""
