"""The answer that a report begins with: share, cost and quality at the threshold in force, and a cheaper threshold.

Quality is given as a fraction of what sending everything to the last pool would reach, with a 95% interval of that
ratio. The cheaper threshold is found by a fixed sequence of tests: from the threshold in force down, as long as the
upper end of the paired interval of the loss is at most MAX_LOSS. The order is fixed beforehand and the first failure
ends it, so looking at many thresholds does not make a lucky one likelier. Where none is found, a dearer threshold is
named: the lowest, from the top down, that is shown to lose at most MAX_LOSS against the last pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.off_policy import PolicyValues, paired_difference
from depo_gateway.training.evaluation.reported_routing import ReportedRouting
from depo_gateway.training.evaluation.threshold_sweep import Sweep, interval_of, interval_rows, routes_at

MAX_LOSS = 0.02  # of the last pool's quality; the loss of the cheaper threshold is below it with 97.5% confidence
MIN_SAVING = 0.02  # of the last pool's cost; a smaller saving is not worth a change
FEW_DIFFERING = 10  # with fewer prompts whose outcome differs, a bootstrap's interval is too narrow
RULE_OF_THREE = 3.0  # events that none of N draws showed may have a probability of 3 / N: the 95% bound
NOTHING_CHEAPER = "nothing cheaper is shown to keep as much"
FEW_PROMPTS = 50  # with fewer labelled prompts, or effective records, no quality is claimed


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a headline rests on."""

    sweep: Sweep | None  # None: nothing measures quality
    count: float  # prompts with every pool's label, or effective records
    missing: str = ""  # why nothing measures quality, as a clause
    differing: int | None = None  # prompts with another outcome in force than from the last pool, where known


def headline(
    evidence: Evidence, routing: ReportedRouting, quality_NK: Array, tokens: Array, pools: tuple[str, ...]
) -> dict[str, Any]:
    """The figures and sentences of a report's beginning, for report.json.

    Args:
        quality_NK: predicted, of all prompts, for share and cost where no quality is measured. tokens: (N,).
    """
    figures: dict[str, Any] = {
        "rule": routing.rule,
        "threshold": routing.threshold,
        "threshold_source": routing.source,
        "costs": None if routing.costs is None else dict(zip(pools, routing.costs, strict=True)),
        "measured": False,
        "prompts": round(evidence.count),
        "differing": evidence.differing,
    }
    sweep = evidence.sweep
    at = None if sweep is None else int(np.searchsorted(sweep.thresholds, routing.threshold))
    missing = evidence.missing or _too_little(evidence, at)
    if sweep is None or at is None or missing:
        figures["in_force"] = route_figures(quality_NK, routing, routing.threshold, tokens, pools)
        figures["sentence"] = f"{_spent_clause(figures, pools)}; how much quality that keeps can't be said: {missing}."
        return figures | {"remarks": [], "alternative": None}
    rows = interval_rows(sweep)
    figures |= {
        "measured": True,
        "in_force": rows[at],
        "all_small": _constant(sweep, 0),
        "all_large": _constant(sweep, -1),
        "gap": interval_of(_gap(sweep), 0),
        "alternative": None,
    }
    if not figures["gap"]["value"] > 0:
        return figures | _no_gap(figures, pools)
    other, direction = cheaper_threshold(sweep, at), "cheaper"
    if other is None:
        other, direction = dearer_threshold(sweep, at), "dearer"
    if other is not None:
        saved = float(sweep.spent[at] - sweep.spent[other])
        change = {"direction": direction, "saved": saved, "lost": _lost(sweep, at, other)}
        figures["alternative"] = {**rows[other], **change}
    kept = kept_text(figures["in_force"]["kept_quality"])
    whose = "its" if "cost" in figures["in_force"] else f"{all_to(pools)}'s"
    spent = _spent_clause(figures, pools, last=False)
    sentence = f"{spent} and keep {kept} of {whose} quality{_alternative_clause(figures, pools)}."
    return figures | {"sentence": sentence, "remarks": _remarks(figures, pools)}


def cheaper_threshold(sweep: Sweep, at: int) -> int | None:
    """The index of the lowest threshold below `at` that is shown to lose at most MAX_LOSS; None if it saves little."""
    found = at
    for lower in range(at - 1, -1, -1):
        if not _lost(sweep, at, lower)["high"] <= MAX_LOSS:
            break
        found = lower
    return found if sweep.spent[at] - sweep.spent[found] >= MIN_SAVING else None


def dearer_threshold(sweep: Sweep, at: int) -> int | None:
    """The index of the lowest threshold above `at` that is shown to lose at most MAX_LOSS of the last pool's quality.

    None if no threshold is, or if that one is not shown to gain, or saves little against the last pool.
    """
    found = None
    for higher in range(len(sweep.thresholds) - 1, at - 1, -1):
        kept = interval_of(sweep.kept(_one(sweep.routed, higher)), 0)
        if not kept["low"] >= 1 - MAX_LOSS:
            break
        found = higher
    if found is None or min(sweep.spent[found] - sweep.spent[at], 1 - sweep.spent[found]) < MIN_SAVING:
        return None
    return found if _lost(sweep, at, found)["high"] < 0 else None


def _lost(sweep: Sweep, at: int, other: int) -> dict[str, float]:
    """The loss from one threshold to another, as a fraction of the last pool's quality."""
    return interval_of(sweep.kept(paired_difference(_one(sweep.routed, at), _one(sweep.routed, other))), 0)


def percent(value: float) -> str:
    """ "46%"; near 0 and 100% with one decimal, so that a little is not shown as nothing."""
    near_end = 0 < value < 0.01 or 0.99 < value < 1
    return f"{100 * value:.{1 if near_end else 0}f}%"


def points(value: float) -> str:
    """A difference of shares or costs, without a sign."""
    return f"{100 * abs(value):.{1 if abs(value) < 0.01 else 0}f}"


def kept_text(of: Mapping[str, float]) -> str:
    """ "97.4% [96.1, 98.6]"; "" where it is not known."""
    if np.isnan(of["value"]):
        return ""
    return f"{100 * of['value']:.1f}% [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


def difference_text(of: Mapping[str, float]) -> str:
    """Points with a sign and their interval: "+2.1 [+0.8, +3.3]"; "" where it is not known."""
    if np.isnan(of["value"]):
        return ""
    value, low, high = (_signed(of[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _signed(value: float) -> str:
    """Points with a sign, but for 0."""
    shown = round(100 * value, 1)
    return f"{shown:+.1f}" if shown else "0.0"


def threshold_text(threshold: float) -> str:
    return f"{threshold:.4g}"


def all_to(pools: Sequence[str]) -> str:
    """The name of sending everything to the last pool."""
    return f"all-{pools[-1]}"


def _spent_clause(figures: Mapping[str, Any], pools: tuple[str, ...], last: bool = True) -> str:
    """Share and cost. `last`: whether no further clause with "and" follows."""
    row = figures["in_force"]
    at = f"At threshold {threshold_text(figures['threshold'])}"
    if len(pools) == 1:
        return f"{at} you send {percent(row['large_share'])} of the prompts on to a pool beyond {pools[0]}"
    sent = f"{at} you send {percent(row['large_share'])} to {pools[-1]}"
    if "cost" not in row:
        return sent
    return f"{sent}{' and' if last else ','} pay {percent(row['cost'])} of {all_to(pools)}'s cost"


def _alternative_clause(figures: Mapping[str, Any], pools: tuple[str, ...]) -> str:
    found, costed = figures["alternative"], "cost" in figures["in_force"]
    if found is None:
        if figures["in_force"]["large_share"] == 0:
            return ""
        return f"; {NOTHING_CHEAPER}"
    saved, dearer = points(found["saved"]), found["direction"] == "dearer"
    change = f"{'cost' if dearer else 'save'} {saved} points more"
    if not costed:
        change = f"send {saved} points {'more' if dearer else 'less'} to {pools[-1]}"
    lost = found["lost"]
    verb, sign = ("lose", 1) if lost["value"] >= 0 else ("gain", -1)
    low, high = sorted((100 * sign * lost["low"], 100 * sign * lost["high"]))
    amount = f"{100 * abs(lost['value']):.1f} [{low:.1f}, {high:.1f}]"
    nothing = f"{NOTHING_CHEAPER}, and " if dearer else ""
    return f"; {nothing}threshold {threshold_text(found['threshold'])} would {change} and {verb} {amount}"


def _remarks(figures: Mapping[str, Any], pools: tuple[str, ...]) -> list[str]:
    """What must be known before the sentence is believed."""
    row = figures["in_force"]
    above = row["kept_above_random"]
    shown = difference_text(above)
    if above["value"] == above["low"] == above["high"] == 0:
        remarks = ["At this threshold every prompt goes to the same pool, so nothing is routed."]
    elif above["low"] > 0:
        remarks = [f"This routing keeps more than random routing with the same shares would: {shown} points."]
    elif above["high"] < 0:
        remarks = [f"This is worse than random routing with the same shares: {shown} points of quality kept."]
    else:
        remarks = [
            f"This is not shown to be better than random routing with the same shares: {shown} points of quality kept."
        ]
    differing, count = figures["differing"], figures["prompts"]
    if differing is not None and 0 < row["large_share"] < 1 and differing < FEW_DIFFERING:
        remarks.append(
            f"Only {differing} of the {count} prompts have another outcome here than under {all_to(pools)}, so the"
            f" interval is too narrow: a loss of {points(RULE_OF_THREE / count)} points could stay unseen."
        )
    gap = figures["gap"]
    if not gap["low"] > 0:
        remarks.append(
            f"Nor is {pools[-1]} shown to be better than {pools[0]} here: quality {_number(gap, '+')} on these prompts."
        )
    return remarks


def _no_gap(figures: Mapping[str, Any], pools: tuple[str, ...]) -> dict[str, Any]:
    """The sentence where the last pool is no better than the first."""
    small, large = (figures[name]["quality"]["value"] for name in ("all_small", "all_large"))
    first, last = pools[0], pools[-1]
    clause = _spent_clause(figures, pools)
    sentence = (
        f"{last} is no better than {first} on these prompts (quality {large:.3f} against {small:.3f}), so there is"
        f" nothing to route for: {clause[0].lower()}{clause[1:]}, and gain nothing."
    )
    difference = f"The difference, {last} minus {first}, is {_number(figures['gap'], '+')}."
    if "cost" in figures["all_small"]:
        cost = percent(figures["all_small"]["cost"])
        difference += f" Sending everything to {first} costs {cost} of {all_to(pools)}'s cost."
    return {"sentence": sentence[0].upper() + sentence[1:], "remarks": [difference]}


def _number(of: Mapping[str, float], sign: str = "") -> str:
    return f"{of['value']:{sign}.3f} [{of['low']:{sign}.3f}, {of['high']:{sign}.3f}]"


def _too_little(evidence: Evidence, at: int | None) -> str:
    """Why the measured quality is not enough for a claim; "" if it is."""
    if evidence.sweep is None or at is None:
        return "no prompt has labels of every pool"
    if evidence.count < FEW_PROMPTS:
        return (
            f"only {evidence.count:.0f} prompts have labels of every pool, and fewer than {FEW_PROMPTS} show too little"
        )
    if np.isnan(evidence.sweep.routed.point[at]) or np.isnan(evidence.sweep.constants.point[[0, -1]]).any():
        return "the labels don't show what the other pools would have answered"
    return ""


def route_figures(
    quality_NK: Array, routing: ReportedRouting, threshold: float, tokens: Array, pools: Sequence[str]
) -> dict[str, Any]:
    """Share and cost at a threshold over all prompts, whether or not they have labels."""
    if len(pools) == 1:
        return {"threshold": threshold, "large_share": float((quality_NK[:, 0] < threshold).mean())}
    route = routes_at(quality_NK, routing.rule, threshold, len(pools))
    row = {"threshold": threshold, "large_share": float((route == len(pools) - 1).mean())}
    if routing.costs is not None:
        of = np.asarray(routing.costs) / routing.costs[-1]
        row["cost"] = float(of[route] @ tokens / tokens.sum())
    return row


def _constant(sweep: Sweep, pool: int) -> dict[str, Any]:
    """Sending everything to one pool."""
    kept = sweep.kept(sweep.constants)
    row: dict[str, Any] = {
        "quality": interval_of(sweep.constants, pool),
        "kept_quality": interval_of(kept, pool),
    }
    if sweep.pool_costs is not None:
        row["cost"] = float(sweep.pool_costs[pool])
    return row


def _gap(sweep: Sweep) -> PolicyValues:
    return paired_difference(_one(sweep.constants, -1), _one(sweep.constants, 0))


def _one(values: PolicyValues, index: int) -> PolicyValues:
    return PolicyValues(values.point[[index]], values.draws[:, [index]])
