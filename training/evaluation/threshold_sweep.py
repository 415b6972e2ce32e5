"""A rule measured over thresholds: shares, cost and quality, beside random routing and prompt length at equal shares.

All values come with draws on the same bootstrap resamples, so that differences and ratios have paired intervals.

Shapes: N prompts, K pools cheapest first, T thresholds rising, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import confidence, route
from depo_gateway.training.evaluation import off_policy
from depo_gateway.training.evaluation.bootstrap import percentile_interval
from depo_gateway.training.evaluation.off_policy import Integers, Logs, OffPolicyEstimates, PolicyValues
from depo_gateway.training.evaluation.routing_metrics import THRESHOLDS

CURVE_POINTS = 25  # evenly spaced over the shares that the rule can give


@dataclass(frozen=True, slots=True)
class Sweep:
    """A rule at T thresholds by one method; NaN where nothing supports an estimate."""

    thresholds: Array  # (T,)
    routed: PolicyValues  # mean quality of the rule
    at_random: PolicyValues  # of random routing with the same shares
    by_length: PolicyValues  # of routing by prompt length with the same shares
    constants: PolicyValues  # of sending everything to one pool, (K,)
    shares: Array  # (T, K)
    share_draws: Array  # (R, T, K)
    cost: Array | None  # (T,) as a fraction of sending everything to the last pool; None: the costs are unknown
    length_cost: Array | None
    random_cost: Array | None
    pool_costs: Array | None  # (K,) relative to the last pool's
    found: OffPolicyEstimates  # how much evidence there is

    @property
    def spent(self) -> Array:
        """(T,): the cost or, where the costs are unknown, the share of the last pool."""
        return self.shares[:, -1] if self.cost is None else self.cost

    def kept(self, values: PolicyValues) -> PolicyValues:
        """Quality as a fraction of the quality of sending everything to the last pool, resampled together.

        NaN where that is 0.
        """
        point, draws = self.constants.point[-1], self.constants.draws[:, -1, None]
        return PolicyValues(
            values.point / (point if point else np.nan), values.draws / np.where(draws == 0, np.nan, draws)
        )


def sweep_thresholds(quality_NK: Array, rule: str, also: Sequence[float] = ()) -> Array:
    """Thresholds (T,): the common ones, `also`, and CURVE_POINTS at even steps of each decisive confidence.

    They do not depend on outcomes. Three decimals, as one would write them into a config, but for `also`.
    """
    confidence_NK = confidence(quality_NK, rule)
    last = max(1, quality_NK.shape[1] - 1)
    decisive = (confidence_NK[:, 0], confidence_NK[:, :last].max(1))
    levels = [np.quantile(values, np.linspace(0.0, 1.0, CURVE_POINTS)) for values in decisive]
    rounded = np.round(np.concatenate([[0.0, 1.0], THRESHOLDS, *levels]), 3).clip(0.0, 1.0)
    return np.unique(np.concatenate([rounded, also]))


def routes_at(quality_NK: Array, rule: str, threshold: float, pools: int) -> NDArray[np.int64]:
    """The pool of each prompt (N,). An estimator of the first pool alone sends to the last what it is not sure of."""
    if quality_NK.shape[1] == 1 and pools > 1:
        return np.where(confidence(quality_NK, rule)[:, 0] >= threshold, 0, pools - 1).astype(np.int64)
    return route(quality_NK, rule, threshold)


def sweep_logs(
    logs: Logs,
    quality_NK: Array,
    length: Array,
    rule: str,
    thresholds: Array,
    tokens: Array,
    costs: Sequence[float] | None,
    clip: float = off_policy.MAX_INVERSE_PROPENSITY,
    min_effective: float = off_policy.MIN_EFFECTIVE,
) -> dict[str, Sweep]:
    """The rule's sweeps by method, doubly_robust and snips. The two are equal where every outcome is known.

    Args:
        quality_NK: predicted, which decides. length, tokens: (N,) of the prompts, and of prompt and answer.
    """
    count, pools = logs.observed.shape
    routes = np.stack([routes_at(quality_NK, rule, float(threshold), pools) for threshold in thresholds], 1)
    shares = np.stack([(routes == k).mean(0) for k in range(pools)], 1)
    constants = np.tile(np.arange(pools), (count, 1))
    policies = np.concatenate([routes, off_policy.length_routing(length, shares), constants], 1)
    found = off_policy.estimate(logs, policies, clip, min_effective)
    cost = None if costs is None else _relative_costs(policies, tokens, costs)
    methods = {"doubly_robust": found.doubly_robust, "snips": found.snips}
    return {name: _sweep(found, values, thresholds, cost, costs) for name, values in methods.items()}


def sweep_outcomes(
    observed: Array,
    quality_NK: Array,
    length: Array,
    rule: str,
    thresholds: Array,
    units: Integers,
    costs: Sequence[float] | None,
    tokens: Array | None = None,
) -> Sweep:
    """The rule's sweep over prompts with every pool's outcome (N, K). Intervals resample whole `units` (N,)."""
    count = len(observed)
    known = Logs(np.zeros(count, np.int64), np.ones(count), observed, observed, units)
    weight = np.ones(count) if tokens is None else tokens
    return sweep_logs(known, quality_NK, length, rule, thresholds, weight, costs, min_effective=0)["snips"]


def differing_outcomes(observed: Array, quality_NK: Array, rule: str, threshold: float) -> int:
    """How many prompts with every pool's outcome (N, K) have another one by the rule than from the last pool."""
    count, pools = observed.shape
    routed = observed[np.arange(count), routes_at(quality_NK, rule, threshold, pools)]
    return int((routed != observed[:, -1]).sum())


def interval_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """A row of figures per threshold, with 95% intervals, for report.json. `coin`: random routing, equal shares."""
    columns = {
        "quality": sweep.routed,
        "coin": sweep.at_random,
        "length": sweep.by_length,
        "against_coin": off_policy.paired_difference(sweep.routed, sweep.at_random),
        "against_length": off_policy.paired_difference(sweep.routed, sweep.by_length),
        "kept_quality": sweep.kept(sweep.routed),
        "kept_above_random": sweep.kept(off_policy.paired_difference(sweep.routed, sweep.at_random)),
    }
    shown = {name: (column.point, *off_policy.value_intervals(column)) for name, column in columns.items()}
    rows: list[dict[str, Any]] = []
    for t, threshold in enumerate(sweep.thresholds):
        low, high = percentile_interval(sweep.share_draws[:, t, -1])
        row: dict[str, Any] = {
            "threshold": float(threshold),
            "large_share": float(sweep.shares[t, -1]),
            "large_share_interval": [low, high],
        }
        costs = {"cost": sweep.cost, "length_cost": sweep.length_cost, "coin_cost": sweep.random_cost}
        row |= {name: float(cost[t]) for name, cost in costs.items() if cost is not None}
        for name, (point, lows, highs) in shown.items():
            row[name] = {"value": float(point[t]), "low": float(lows[t]), "high": float(highs[t])}
        row |= {name: float(getattr(sweep.found, name)[t]) for name in ("effective", "expected", "unsupported")}
        rows.append(row)
    return rows


def interval_of(values: PolicyValues, index: int) -> dict[str, float]:
    """One policy's value with its 95% interval."""
    if np.isnan(values.point[index]):
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    low, high = percentile_interval(values.draws[:, index])
    return {"value": float(values.point[index]), "low": low, "high": high}


def _relative_costs(policies: Integers, tokens: Array, costs: Sequence[float]) -> Array:
    of = np.asarray(costs) / costs[-1]
    return np.array([float(of[policy] @ tokens / tokens.sum()) for policy in policies.T])


def _sweep(
    found: OffPolicyEstimates,
    values: PolicyValues,
    thresholds: Array,
    cost: Array | None,
    costs: Sequence[float] | None,
) -> Sweep:
    count = len(thresholds)
    routed, by_length, constants = (
        PolicyValues(values.point[part], values.draws[:, part])
        for part in (slice(0, count), slice(count, 2 * count), slice(2 * count, None))
    )
    shares, share_draws = found.shares[:count], found.share_draws[:, :count]
    at_random = off_policy.random_routing(constants, shares, share_draws)
    relative = None if costs is None else np.asarray(costs) / costs[-1]
    return Sweep(
        thresholds,
        routed,
        at_random,
        by_length,
        constants,
        shares,
        share_draws,
        None if cost is None else cost[:count],
        None if cost is None else cost[count : 2 * count],
        None if relative is None else shares @ relative,
        relative,
        found,
    )
