"""Report of a checkpoint's rules on logged traffic: at each threshold, estimates with intervals.

Shapes: N records, K pools cheapest first, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import RULES, confidence, route
from depo_gateway.training.evaluation import off_policy
from depo_gateway.training.evaluation.logged_traffic import LoggedTraffic, reason_counts
from depo_gateway.training.evaluation.markdown import table, with_interval
from depo_gateway.training.evaluation.off_policy import Integers, Logs, OffPolicyEstimates, PolicyValues
from depo_gateway.training.evaluation.report import curve_axes
from depo_gateway.training.evaluation.routing_metrics import THRESHOLDS

CURVE_POINTS = 13  # evenly spaced over the shares that the rule can give
FEW_EFFECTIVE = 100  # effective records; with fewer, intervals are rough
METHODS = {"doubly_robust": "doubly robust", "snips": "SNIPS", "direct": "known outcomes"}


def logs_report(
    traffic: LoggedTraffic, quality_NK: Array, length: Array, costs: tuple[float, ...] | None, clip: float
) -> dict[str, Any]:
    """Counts of records, and for each rule and method a row per threshold.

    Args:
        length: of the prompts (N,), for the length baseline. costs: per token, by pool; None: report shares only.
    """
    complete = ~np.isnan(traffic.observed).any(1)
    free = np.flatnonzero(traffic.free)
    every = traffic.logs(quality_NK)
    keep, left_out = off_policy.usable_records(every)
    logs, rows = off_policy.select_records(every, keep), free[keep]
    known = Logs(
        traffic.pool[complete],
        np.ones(int(complete.sum())),
        traffic.observed[complete],
        quality_NK[complete],
        np.unique(traffic.conversation[complete], return_inverse=True)[1],
    )
    report: dict[str, Any] = {
        "read": traffic.read,
        "unused": dict(traffic.unused),
        "complete": int(complete.sum()),
        "weighted": int((logs.seen | logs.complete).sum()),
        "for_shares": int((~logs.seen & ~logs.complete).sum()),
        "not_weighted": {**traffic.not_free, **left_out},
        "label_rates": dict(zip(traffic.pools, off_policy.label_rates(logs).tolist(), strict=True)),
        "explored": bool((logs.propensity[~logs.complete] < 1).any()),
        "clip": clip,
        "clipped": 0.0,
        "rules": {},
    }
    for rule in RULES:
        methods: dict[str, Any] = {}
        thresholds = _thresholds(quality_NK, rule)
        if len(rows):
            policies = _policies(logs, rule, thresholds, length[rows])
            found = off_policy.estimate(logs, policies, clip)
            report["clipped"] = found.clipped
            parts = found.doubly_robust, found.snips
            for name, values in zip(("doubly_robust", "snips"), parts, strict=True):
                methods[name] = _rows(found, values, thresholds, policies, traffic.tokens[rows], costs)
        if complete.any():
            policies = _policies(known, rule, thresholds, length[complete])
            found = off_policy.estimate(known, policies, min_effective=0)
            methods["direct"] = _rows(found, found.snips, thresholds, policies, traffic.tokens[complete], costs)
        report["rules"][rule] = methods
    return report


def _thresholds(quality_NK: Array, rule: str) -> Array:
    """The common thresholds, and CURVE_POINTS at even steps of the share. They do not depend on outcomes."""
    decisive = confidence(quality_NK, rule)[:, :-1].max(1)
    levels = np.quantile(decisive, np.linspace(0.0, 1.0, CURVE_POINTS))
    return np.unique(np.round(np.concatenate([[0.0, 1.0], THRESHOLDS, levels]), 4).clip(0.0, 1.0))


def _policies(logs: Logs, rule: str, thresholds: Array, length: Array) -> Integers:
    """(N, 2 T + K): the rule at each threshold, prompt length at the same shares, then each pool for all prompts."""
    count, pools = logs.observed.shape
    routes = np.stack([route(logs.predicted, rule, float(threshold)) for threshold in thresholds], 1)
    shares = np.stack([(routes == k).mean(0) for k in range(pools)], 1)
    constants = np.tile(np.arange(pools), (count, 1))
    return np.concatenate([routes, off_policy.length_routing(length, shares), constants], 1)


def _rows(
    found: OffPolicyEstimates,
    values: PolicyValues,
    thresholds: Array,
    policies: Integers,
    tokens: Array,
    costs: tuple[float, ...] | None,
) -> list[dict[str, Any]]:
    """One method's row for each threshold, NaN where the logs do not support an estimate."""
    count = len(thresholds)
    routed, by_length, constants = (
        PolicyValues(values.point[part], values.draws[:, part])
        for part in (slice(0, count), slice(count, 2 * count), slice(2 * count, None))
    )
    at_random = off_policy.random_routing(constants, found.shares[:count], found.share_draws[:, :count])
    columns = {
        "quality": routed,
        "coin": at_random,
        "length": by_length,
        "against_coin": off_policy.paired_difference(routed, at_random),
        "against_length": off_policy.paired_difference(routed, by_length),
    }
    shown = {name: (column.point, *off_policy.value_intervals(column)) for name, column in columns.items()}
    rows: list[dict[str, Any]] = []
    for t, threshold in enumerate(thresholds):
        row: dict[str, Any] = {"threshold": float(threshold), "large_share": float(found.shares[t, -1])}
        if costs is not None:
            of = np.asarray(costs) / costs[-1]
            row["cost"], row["length_cost"] = (
                float(of[policies[:, i]] @ tokens / tokens.sum()) for i in (t, count + t)
            )
            row["coin_cost"] = float(found.shares[t] @ of)
        for name, (point, low, high) in shown.items():
            row[name] = {"value": float(point[t]), "low": float(low[t]), "high": float(high[t])}
        row |= {name: float(getattr(found, name)[t]) for name in ("effective", "expected", "unsupported")}
        rows.append(row)
    return rows


def logs_markdown(report: Mapping[str, Any]) -> str:
    """The section of report.md on logged decisions."""
    lines = ["", "## From logged decisions", "", *_record_lines(report)]
    for rule, methods in report["rules"].items():
        if "snips" in methods:
            lines += ["", f"Rule {rule}, from all labels:", "", _table(methods["doubly_robust"], methods["snips"])]
        if "direct" in methods:
            lines += ["", f"Rule {rule}, where every pool's label is known:", "", _table(methods["direct"])]
    rows = [row for methods in report["rules"].values() for row in methods.get("snips", []) if _is_estimated(row)]
    if any(min(row["effective"], row["expected"]) < FEW_EFFECTIVE for row in rows):
        lines += ["", f"With fewer than {FEW_EFFECTIVE} effective records, intervals are rough and usually too narrow."]
    return "\n".join(lines) + "\n"


def _record_lines(report: Mapping[str, Any]) -> list[str]:
    """Which records were used for what, and what limits the estimates."""
    lines = [
        f"{report['read']} records read. {report['complete']} have every pool's label; {report['weighted']} have"
        f" weights; {report['for_shares']} without a label count only in the shares."
    ]
    if report["unused"]:
        lines.append(f"Not used at all: {reason_counts(report['unused'])}.")
    if report["not_weighted"]:
        lines.append(f"Not weighted: {reason_counts(report['not_weighted'])}.")
    if report["weighted"] + report["for_shares"] == 0 or not any(report["label_rates"].values()):
        return lines
    rates = ", ".join(f"{pool} {rate:.1%}" for pool, rate in report["label_rates"].items())
    lines.append(f"Share of each pool's records with a label, shadowed records excluded: {rates}.")
    if not report["explored"]:
        lines += [
            "",
            "**These decisions were deterministic (routing.explore: 0).** They show the quality of the routing in use,"
            f" not of another: where a threshold would have sent more than {off_policy.MAX_UNSUPPORTED:.0%} of the"
            " records elsewhere, there is no estimate. Set routing.explore to about 0.02, or use shadowing.",
        ]
    if report["clipped"]:
        lines.append(
            f"Weights above {report['clip']:g} were clipped: {report['clipped']:.1%} of the labels. This biases"
            " estimates towards the routing that was in use."
        )
    return lines


def _is_estimated(row: Mapping[str, Any]) -> bool:
    return not np.isnan(row["quality"]["value"])


def _table(rows: list[dict[str, Any]], snips: list[dict[str, Any]] | None = None) -> str:
    """One row per threshold; where `snips` is given, `rows` are doubly robust and both estimates are shown."""
    cells = []
    for t, row in enumerate(rows):
        line = {"threshold": f"{row['threshold']:.4g}", "large share": f"{row['large_share']:.3f}"}
        if "cost" in row:
            line["relative cost"] = f"{row['cost']:.3f}"
        line["quality" if snips is None else "doubly robust"] = _estimate(row["quality"]) or _why_missing(row)
        if snips is not None:
            line["SNIPS"] = _estimate(snips[t]["quality"])
        line["random"], line["length"] = (_number(row[name]["value"]) for name in ("coin", "length"))
        line["against random, paired"] = _estimate(row["against_coin"], sign="+")
        if snips is not None:
            line["effective records"] = f"{min(row['effective'], row['expected']):.0f}"
        cells.append(line)
    return table([list(line.values()) for line in cells], list(cells[0]))


def _estimate(of: Mapping[str, float], sign: str = "") -> str:
    return "" if np.isnan(of["value"]) else with_interval(of["value"], of["low"], of["high"], sign)


def _why_missing(row: Mapping[str, Any]) -> str:
    if row["unsupported"] > off_policy.MAX_UNSUPPORTED:
        return f"no support ({row['unsupported']:.0%} unknown)"
    return f"too few ({row['expected']:.0f} effective)"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def plot_logs(path: Path, report: Mapping[str, Any]) -> None:
    """Plots quality over the share of large calls, or over relative cost if known; gaps where there is no support."""
    with curve_axes(path) as axes:
        for rule, color in zip(RULES, ("C0", "C1"), strict=True):
            for name, style in (("doubly_robust", ".-"), ("direct", ".--")):
                rows = report["rules"][rule].get(name, [])
                if not any(map(_is_estimated, rows)):
                    continue
                x = [row["cost" if "cost" in row else "large_share"] for row in rows]
                line = f"{rule}, {METHODS[name]}"
                axes.plot(x, [row["quality"]["value"] for row in rows], style, color=color, label=line, linewidth=1.4)
                if name == "doubly_robust":
                    low, high = ([row["quality"][end] for row in rows] for end in ("low", "high"))
                    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        methods = report["rules"]["difficulty"]  # its thresholds reach every share
        rows = max(methods.values(), key=lambda rows: sum(map(_has_baseline, rows)), default=[])
        costed = bool(rows) and "cost" in rows[0]
        for name, line, style in (("coin", "random", "--"), ("length", "prompt length", ":")):
            if not all(np.isnan(row[name]["value"]) for row in rows):
                x = [row[f"{name}_cost" if costed else "large_share"] for row in rows]
                axes.plot(x, [row[name]["value"] for row in rows], style, color="0.5", label=line)
        if costed:
            axes.set_xlabel("cost, relative to sending everything to the large pool")


def _has_baseline(row: Mapping[str, Any]) -> bool:
    return not np.isnan(row["coin"]["value"])
