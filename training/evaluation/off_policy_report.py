"""What is said of a checkpoint's rules on logged traffic: at each threshold, estimates with intervals.

Shapes: N records, K pools cheapest first, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator.calibration import RULES, confidence, route
from depo_gateway.training.evaluation import off_policy
from depo_gateway.training.evaluation.logged_traffic import Logged, counted
from depo_gateway.training.evaluation.off_policy import Array, Estimated, Integers, Logs, Values
from depo_gateway.training.evaluation.routing_metrics import THRESHOLDS, table

POINTS = 13  # of a curve, evenly spread over the shares that the rule can give
FEW = 100  # effective records; with fewer an interval is itself a guess
METHODS = {"doubly_robust": "doubly robust", "snips": "SNIPS", "direct": "known outcomes"}


def report_of(
    traffic: Logged, quality_NK: Array, length: Array, costs: tuple[float, ...] | None, clip: float
) -> dict[str, Any]:
    """Counts, and rule -> method -> a row a threshold.

    Args:
        length: of the prompts (N,), for the routing by it. costs: of a token, by pool; None: shares alone.
    """
    complete = ~np.isnan(traffic.observed).any(1)
    free = np.flatnonzero(traffic.free)
    every = traffic.logs(quality_NK)
    keep, left_out = off_policy.usable(every)
    logs, rows = off_policy.subset(every, keep), free[keep]
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
            found = off_policy.estimate(known, policies, least=0)
            methods["direct"] = _rows(found, found.snips, thresholds, policies, traffic.tokens[complete], costs)
        report["rules"][rule] = methods
    return report


def _thresholds(quality_NK: Array, rule: str) -> Array:
    """Those that everyone asks for, and POINTS at even steps of the share. Outcomes play no part."""
    decisive = confidence(quality_NK, rule)[:, :-1].max(1)
    levels = np.quantile(decisive, np.linspace(0.0, 1.0, POINTS))
    return np.unique(np.round(np.concatenate([[0.0, 1.0], THRESHOLDS, levels]), 4).clip(0.0, 1.0))


def _policies(logs: Logs, rule: str, thresholds: Array, length: Array) -> Integers:
    """(N, 2 T + K): the rule at each threshold, prompt length at the same shares, then each pool for everything."""
    count, pools = logs.observed.shape
    routes = np.stack([route(logs.predicted, rule, float(threshold)) for threshold in thresholds], 1)
    shares = np.stack([(routes == k).mean(0) for k in range(pools)], 1)
    constants = np.tile(np.arange(pools), (count, 1))
    return np.concatenate([routes, off_policy.by_length(length, shares), constants], 1)


def _rows(
    found: Estimated,
    values: Values,
    thresholds: Array,
    policies: Integers,
    tokens: Array,
    costs: tuple[float, ...] | None,
) -> list[dict[str, Any]]:
    """One method's row for each threshold, null where the logs can't tell."""
    count = len(thresholds)
    routed, by_length, constants = (
        Values(values.point[part], values.draws[:, part])
        for part in (slice(0, count), slice(count, 2 * count), slice(2 * count, None))
    )
    by_coin = off_policy.coin(constants, found.shares[:count], found.share_draws[:, :count])
    columns = {
        "quality": routed,
        "coin": by_coin,
        "length": by_length,
        "against_coin": off_policy.difference(routed, by_coin),
        "against_length": off_policy.difference(routed, by_length),
    }
    shown = {name: (column.point, *off_policy.interval(column)) for name, column in columns.items()}
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


def markdown(report: Mapping[str, Any]) -> str:
    """The part of report.md on what logs say."""
    lines = ["", "## From logged decisions", ""]
    lines.append(
        f"{report['read']} records read. {report['complete']} have every pool's label; {report['weighted']} carry"
        f" weights; {report['for_shares']} without label tell shares alone."
    )
    if report["unused"]:
        lines.append(f"Not used at all: {counted(report['unused'])}.")
    if report["not_weighted"]:
        lines.append(f"Not weighted: {counted(report['not_weighted'])}.")
    partial = report["weighted"] + report["for_shares"] > 0 and any(report["label_rates"].values())
    if partial:
        rates = ", ".join(f"{pool} {rate:.1%}" for pool, rate in report["label_rates"].items())
        lines.append(f"Records with a label, of those a pool served and that were not shadowed: {rates}.")
        if not report["explored"]:
            lines += [
                "",
                "**These decisions left nothing to chance (routing.explore: 0).** They show what the routing in use"
                " scored, not what another would: where a threshold would have sent over"
                f" {off_policy.UNSUPPORTED:.0%} of the records elsewhere, no estimate is given. Set routing.explore to"
                " 0.02 or so, or shadow.",
            ]
        if report["clipped"]:
            lines.append(
                f"Weights beyond {report['clip']:g} were clipped: {report['clipped']:.1%} of the labels. Estimates lean"
                " towards the routing that was in use."
            )
    for rule, methods in report["rules"].items():
        if "snips" in methods:
            lines += ["", f"Rule {rule}, from all labels:", "", _table(methods["doubly_robust"], methods["snips"])]
        if "direct" in methods:
            lines += ["", f"Rule {rule}, where every pool's label is known:", "", _table(methods["direct"])]
    rough = [row for methods in report["rules"].values() for row in methods.get("snips", []) if _told(row)]
    if any(min(row["effective"], row["expected"]) < FEW for row in rough):
        lines += ["", f"Where fewer than {FEW} records are effective, intervals are rough, and rather too narrow."]
    return "\n".join(lines) + "\n"


def _told(row: Mapping[str, Any]) -> bool:
    return not np.isnan(row["quality"]["value"])


def _table(rows: list[dict[str, Any]], snips: list[dict[str, Any]] | None = None) -> str:
    """With SNIPS' estimates beside the doubly robust ones, if these are such."""
    cells = []
    for t, row in enumerate(rows):
        ahead = row["against_coin"]
        line = {"threshold": f"{row['threshold']:.4g}", "large share": f"{row['large_share']:.3f}"}
        if "cost" in row:
            line["relative cost"] = f"{row['cost']:.3f}"
        line["quality" if snips is None else "doubly robust"] = _with_interval(row["quality"], row)
        if snips is not None:
            line["SNIPS"] = _with_interval(snips[t]["quality"])
        line["coin"], line["length"] = (_number(row[name]["value"]) for name in ("coin", "length"))
        line["against the coin, paired"] = _with_interval(ahead, sign="+")
        if snips is not None:
            line["effective records"] = f"{min(row['effective'], row['expected']):.0f}"
        cells.append(line)
    return table([list(line.values()) for line in cells], list(cells[0]))


def _with_interval(of: Mapping[str, float], row: Mapping[str, Any] | None = None, sign: str = "") -> str:
    """A value with its interval; without one, the reason why, if a row is given to tell it."""
    if not np.isnan(of["value"]):
        return f"{of['value']:{sign}.3f} [{of['low']:{sign}.3f}, {of['high']:{sign}.3f}]"
    if row is None:
        return ""
    if row["unsupported"] > off_policy.UNSUPPORTED:
        return f"no support ({row['unsupported']:.0%} unknown)"
    return f"too few ({row['expected']:.0f} effective)"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Quality over the share of large calls, or over relative cost where costs were given; gaps without support."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    costed = False
    for rule, color in zip(RULES, ("C0", "C1"), strict=True):
        for name, style in (("doubly_robust", ".-"), ("direct", ".--")):
            rows = report["rules"][rule].get(name, [])
            if not any(map(_told, rows)):
                continue
            costed = "cost" in rows[0]
            x = [row["cost" if costed else "large_share"] for row in rows]
            line = f"{rule}, {METHODS[name]}"
            axes.plot(x, [row["quality"]["value"] for row in rows], style, color=color, label=line, linewidth=1.4)
            if name == "doubly_robust":
                low, high = ([row["quality"][end] for row in rows] for end in ("low", "high"))
                axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    methods = report["rules"]["difficulty"]  # its thresholds reach every share
    rows = max(methods.values(), key=lambda rows: sum(not np.isnan(row["coin"]["value"]) for row in rows), default=[])
    for name, line, style in (("coin", "random", "--"), ("length", "prompt length", ":")):
        if not all(np.isnan(row[name]["value"]) for row in rows):
            x = [row[f"{name}_cost" if costed else "large_share"] for row in rows]
            axes.plot(x, [row[name]["value"] for row in rows], style, color="0.5", label=line)
    if axes.lines:
        axes.legend(loc="lower right", fontsize=8)
    label = "cost, of sending everything to the large pool" if costed else "share of calls to the large pool"
    axes.set(xlabel=label, ylabel="mean quality", xlim=(0, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
