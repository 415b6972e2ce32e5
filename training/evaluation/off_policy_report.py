"""Report of a checkpoint's rules on logged traffic: at each threshold, estimates with intervals; and what served.

Shapes: N records, K pools cheapest first, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import RULES
from depo_gateway.training.evaluation import off_policy
from depo_gateway.training.evaluation.headline import Evidence
from depo_gateway.training.evaluation.logged_traffic import LoggedTraffic, reason_counts
from depo_gateway.training.evaluation.markdown import with_interval
from depo_gateway.training.evaluation.off_policy import Logs, PolicyValues
from depo_gateway.training.evaluation.page import Block, Heading, Paragraph, TableBlock
from depo_gateway.training.evaluation.reported_routing import ReportedRouting
from depo_gateway.training.evaluation.routing_metrics import THRESHOLDS
from depo_gateway.training.evaluation.threshold_sweep import (
    Sweep,
    differing_outcomes,
    interval_of,
    interval_rows,
    sweep_logs,
    sweep_outcomes,
    sweep_thresholds,
)

FEW_EFFECTIVE = 100  # effective records; with fewer, intervals are rough
METHODS = {"doubly_robust": "doubly robust", "snips": "SNIPS", "direct": "known outcomes"}


@dataclass(frozen=True, slots=True)
class TrafficSweeps:
    """A checkpoint's rules on logged traffic: by rule and method, the records behind each method, and their counts."""

    logs: Logs  # for doubly_robust and snips
    known: Logs  # with every pool's label, for direct
    deciding_logs: Array  # what routing of `logs` goes by
    deciding_known: Array  # and of `known`
    tokens: Mapping[str, Array]  # by method
    sweeps: Mapping[str, Mapping[str, Sweep]]  # by rule, then method
    figures: dict[str, Any]  # the counts, for report.json


def traffic_sweeps(
    traffic: LoggedTraffic, quality_NK: Array, deciding: Array, length: Array, routing: ReportedRouting, clip: float
) -> TrafficSweeps:
    """Sweeps of every rule, by the methods that the records allow.

    Args:
        quality_NK: predicted, which the doubly robust estimate corrects. deciding: (N, K) what routing goes by.
        length: of the prompts (N,), for the length baseline.
    """
    complete = np.asarray(~np.isnan(traffic.observed).any(1))
    free = np.flatnonzero(traffic.free)
    every = traffic.logs(quality_NK)
    keep, left_out = off_policy.usable_records(every)
    logs, rows = off_policy.select_records(every, keep), free[keep]
    units = np.unique(traffic.conversation[complete], return_inverse=True)[1]
    observed = traffic.observed[complete]
    known = Logs(traffic.pool[complete], np.ones(len(observed)), observed, observed, units)
    tokens = {"doubly_robust": traffic.tokens[rows], "direct": traffic.tokens[complete]}
    sweeps: dict[str, dict[str, Sweep]] = {}
    for rule in RULES:
        thresholds = sweep_thresholds(deciding, rule, [routing.threshold] if rule == routing.rule else [])
        sweeps[rule] = {}
        if len(rows):
            of_rows = (deciding[rows], length[rows], rule, thresholds, tokens["doubly_robust"], routing.costs)
            sweeps[rule] |= sweep_logs(logs, *of_rows, clip)
        if complete.any():
            of_known = (deciding[complete], length[complete], rule, thresholds, units, routing.costs)
            sweeps[rule]["direct"] = sweep_outcomes(observed, *of_known, tokens["direct"])
    clipped = [sweep.found.clipped for methods in sweeps.values() for sweep in methods.values()]
    figures = _counts(traffic, logs, complete, left_out) | {"clip": clip, "clipped": max(clipped, default=0.0)}
    return TrafficSweeps(logs, known, deciding[rows], deciding[complete], tokens, sweeps, figures)


def _counts(
    traffic: LoggedTraffic, logs: Logs, complete: NDArray[np.bool_], left_out: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "read": traffic.read,
        "unused": dict(traffic.unused),
        "complete": int(complete.sum()),
        "weighted": int((logs.seen | logs.complete).sum()),
        "for_shares": int((~logs.seen & ~logs.complete).sum()),
        "not_weighted": {**traffic.not_free, **left_out},
        "label_rates": dict(zip(traffic.pools, off_policy.label_rates(logs).tolist(), strict=True)),
        "explored": bool(logs.explored[~logs.complete].any()),
    }


def logs_report(found: TrafficSweeps) -> dict[str, Any]:
    """For report.json: the counts, and for each rule and method a row per threshold."""
    rules = {rule: {name: interval_rows(of) for name, of in by.items()} for rule, by in found.sweeps.items()}
    return {**found.figures, "rules": rules}


def best_method(found: TrafficSweeps, routing: ReportedRouting) -> tuple[str, Evidence]:
    """The method with the most evidence at the threshold in force; which one does not depend on outcomes.

    Known outcomes count by their number, weighted records by their expected effective number.
    """
    methods = found.sweeps[routing.rule]
    evidence = {}
    for name in ("doubly_robust", "direct"):
        if name in methods:
            sweep = methods[name]
            at = int(np.searchsorted(sweep.thresholds, routing.threshold))
            values = (sweep.routed.point[at], sweep.constants.point[0], sweep.constants.point[-1])
            if not np.isnan(values).any():
                effective = min(sweep.found.effective[at], sweep.found.expected[at])
                count = len(found.known.pool) if name == "direct" else float(effective)
                differing = None
                if name == "direct":
                    known = (found.known.observed, found.deciding_known)
                    differing = differing_outcomes(*known, routing.rule, routing.threshold)
                evidence[name] = Evidence(sweep, count, differing=differing)
    if not evidence:
        why = "" if found.figures["explored"] else " (routing.explore is 0 and nothing was shadowed)"
        return "none", Evidence(None, 0, f"the records don't show what the other pool would have answered{why}")
    name = max(evidence, key=lambda name: evidence[name].count)
    return name, evidence[name]


def change_from_served(
    found: TrafficSweeps, method: str, routing: ReportedRouting, also: float | None
) -> dict[str, Any]:
    """The routing that served, and the change to the threshold in force and to `also`, on the same records.

    Without any quality where the method is none; empty where no record was routed freely.
    """
    logs = found.known if method == "direct" else found.logs
    tokens = found.tokens["direct" if method == "direct" else "doubly_robust"]
    pools = logs.observed.shape[1]
    served: dict[str, Any] = {"large_share": float((logs.pool == pools - 1).mean())} if len(logs.pool) else {}
    if routing.costs is not None and served:
        of = np.asarray(routing.costs) / routing.costs[-1]
        served["cost"] = float(of[logs.pool] @ tokens / tokens.sum())
    changes: dict[str, Any] = {"served": served, "records": len(logs.pool)}
    if not served:
        return changes
    sweep = found.sweeps[routing.rule]["direct" if method == "direct" else "doubly_robust"]
    value = off_policy.logged_quality(logs)
    served["quality"] = interval_of(value, 0)
    served["kept_quality"] = interval_of(sweep.kept(value), 0)
    for name, threshold in (("in_force", routing.threshold), ("alternative", also)):
        if threshold is not None:
            at = int(np.searchsorted(sweep.thresholds, threshold))
            routed = PolicyValues(sweep.routed.point[[at]], sweep.routed.draws[:, [at]])
            changes[name] = {
                "large_share": float(sweep.shares[at, -1]) - served["large_share"],
                "quality": interval_of(off_policy.paired_difference(routed, value), 0),
                "kept_quality": interval_of(sweep.kept(off_policy.paired_difference(routed, value)), 0),
            }
            if sweep.cost is not None:
                changes[name]["cost"] = float(sweep.cost[at]) - served["cost"]
    return changes


def logs_blocks(report: Mapping[str, Any], threshold: float) -> list[Block]:
    """The appendix on logged decisions: at the common thresholds and the one in force."""
    blocks: list[Block] = [Heading(3, "From logged decisions"), *map(Paragraph, _record_lines(report))]
    shown = {0.0, 1.0, threshold, *THRESHOLDS}
    for rule, methods in report["rules"].items():
        chosen = {name: [row for row in rows if row["threshold"] in shown] for name, rows in methods.items()}
        if "snips" in methods:
            title = f"Rule {rule}, from all labels"
            blocks.append(_table(title, chosen["doubly_robust"], chosen["snips"]))
        if "direct" in methods:
            blocks.append(_table(f"Rule {rule}, where every pool's label is known", chosen["direct"]))
    rows = [row for methods in report["rules"].values() for row in methods.get("snips", []) if _is_estimated(row)]
    if any(min(row["effective"], row["expected"]) < FEW_EFFECTIVE for row in rows):
        blocks.append(
            Paragraph(f"With fewer than {FEW_EFFECTIVE} effective records, intervals are rough and usually too narrow.")
        )
    return blocks


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
        lines.append(
            "These decisions were deterministic (routing.explore: 0). They show the quality of the routing in use,"
            f" not of another: where a threshold would have sent more than {off_policy.MAX_UNSUPPORTED:.0%} of the"
            " records elsewhere, there is no estimate. Set routing.explore to about 0.02, or use shadowing."
        )
    if report["clipped"]:
        lines.append(
            f"Weights above {report['clip']:g} were clipped: {report['clipped']:.1%} of the labels. This biases"
            " estimates towards the routing that was in use."
        )
    return lines


def _is_estimated(row: Mapping[str, Any]) -> bool:
    return not np.isnan(row["quality"]["value"])


def _table(title: str, rows: Sequence[dict[str, Any]], snips: Sequence[dict[str, Any]] | None = None) -> TableBlock:
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
    return TableBlock(title, list(cells[0]), [list(line.values()) for line in cells])


def _estimate(of: Mapping[str, float], sign: str = "") -> str:
    return "" if np.isnan(of["value"]) else with_interval(of["value"], of["low"], of["high"], sign)


def _why_missing(row: Mapping[str, Any]) -> str:
    if row["unsupported"] > off_policy.MAX_UNSUPPORTED:
        return f"no support ({row['unsupported']:.0%} unknown)"
    return f"too few ({row['expected']:.0f} effective)"


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"
