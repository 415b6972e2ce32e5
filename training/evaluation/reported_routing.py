"""The routing that a report is about: rule, threshold and costs, from flags, a gateway.yaml, or the defaults.

gateway.yaml is the gateway's, which checks all of it; only what a report needs is read here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import RULES, Calibration, measure_curve
from depo_gateway.estimator.configuration.yaml_tree import build, read_yaml, within
from depo_gateway.training.evaluation.targets import parse_costs

DEFAULT_THRESHOLD = 0.85  # routing.threshold's
DEFAULT_COST = 1.0  # pools.NAME.cost's
TARGETS_OF_CONFIG = ("large_share", "quality", "cost")


@dataclass(frozen=True, slots=True)
class ReportedRouting:
    """What decides, and from where that is known."""

    rule: str
    threshold: float
    source: str  # of the threshold, as a clause: "from gateway.yaml"
    costs: tuple[float, ...] | None = None  # per token, by pool; None: unknown
    target: tuple[str, float] | None = None  # one of TARGETS_OF_CONFIG, whose threshold must still be found


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --threshold and --costs."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a gateway.yaml: its rule, its threshold or target, its costs"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help=f"the threshold in force (default: --config's, else the records' own, else {DEFAULT_THRESHOLD:g})",
    )
    parser.add_argument("--costs", nargs="+", default=[], metavar="NAME=X", help="cost per token of each pool")


def read_routing(args: argparse.Namespace, pools: tuple[str, ...], default: ReportedRouting) -> ReportedRouting:
    """The routing by flags and --config; `default` where they say nothing. `pools`: those whose costs count."""
    found = default
    if args.config is not None:
        config = _mapping(read_yaml(args.config), str(args.config))
        found = _config_routing(config, str(args.config), default.rule)
        found = dataclasses.replace(found, costs=_config_costs(config, pools, str(args.config)))
    costs = parse_costs(args.costs, pools) or found.costs
    if args.threshold is not None:
        within(args.threshold, 0, 1, "--threshold")
        return ReportedRouting(found.rule, args.threshold, "from --threshold", costs)
    return dataclasses.replace(found, costs=costs)


def default_routing(pools: tuple[str, ...]) -> ReportedRouting:
    """The gateway's defaults, for a checkpoint of these pools."""
    return ReportedRouting("gain" if len(pools) > 1 else "difficulty", DEFAULT_THRESHOLD, "the gateway's default")


def with_target_met(
    routing: ReportedRouting, calibrated: Calibration, quality_NK: Array, tokens: Array
) -> ReportedRouting:
    """The routing with the threshold that meets its target: a share or a cost on these prompts, as the gateway does;
    a quality by the checkpoint's own curve.

    Raises ValueError for a target that can't be met.
    """
    if routing.target is None:
        return routing
    name, wanted = routing.target
    curves = dict(calibrated.curves)
    if name != "quality":
        weights = tokens if name == "cost" else np.ones(len(tokens))
        curves[routing.rule] = measure_curve(quality_NK, np.full_like(quality_NK, np.nan), weights, routing.rule)
    measured = dataclasses.replace(calibrated, curves=curves)
    threshold = measured.threshold(routing.rule, costs=routing.costs, **{name: wanted})
    where = "by the checkpoint's own curve" if name == "quality" else "on these prompts"
    source = f"{routing.source}: it meets routing.target {name} {wanted:g} {where}"
    return dataclasses.replace(routing, threshold=threshold, source=source, target=None)


def _config_routing(config: Mapping[str, Any], path: str, default_rule: str) -> ReportedRouting:
    routing = _mapping(config.get("routing", {}), "routing")
    rule = routing.get("rule", default_rule)
    if rule not in RULES:
        raise ValueError(f"routing.rule is {rule!r}; write one of {', '.join(RULES)}")
    threshold = build(float, routing.get("threshold", DEFAULT_THRESHOLD), "routing.threshold")
    within(threshold, 0, 1, "routing.threshold")
    target = None
    if "target" in routing:
        given = _mapping(routing["target"], "routing.target")
        if len(given) != 1 or not set(given) <= set(TARGETS_OF_CONFIG):
            raise ValueError(f"routing.target takes one of {', '.join(TARGETS_OF_CONFIG)}")
        ((name, value),) = given.items()
        target = (name, build(float, value, f"routing.target.{name}"))
        within(target[1], 0, 1, f"routing.target.{name}")
    return ReportedRouting(rule, threshold, f"from {path}", target=target)


def _config_costs(config: Mapping[str, Any], pools: tuple[str, ...], path: str) -> tuple[float, ...] | None:
    """The pools' costs; None where the config states none."""
    sections = _mapping(config.get("pools", {}), "pools")
    if tuple(sections) != pools:
        raise ValueError(
            f"{path} has the pools {', '.join(map(str, sections)) or '(none)'}, this report {', '.join(pools)}; give"
            " the gateway.yaml that serves this checkpoint"
        )
    stated = [_mapping(section, f"pools.{name}").get("cost") for name, section in sections.items()]
    if all(cost is None for cost in stated):
        return None
    costs = [
        DEFAULT_COST if cost is None else build(float, cost, f"pools.{name}.cost")
        for name, cost in zip(pools, stated, strict=True)
    ]
    if not costs[-1] > 0 or min(costs) < 0:
        raise ValueError(f"{path} has the costs {', '.join(f'{cost:g}' for cost in costs)}; the last must be above 0")
    return tuple(costs)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a mapping; give a gateway.yaml")
    return value
