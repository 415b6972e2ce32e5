"""Targets and the thresholds that meet them: a large share, a quality, a cost, or a loss that is guaranteed.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.share_interval import share_interval
from depo_gateway.training.evaluation.markdown import table
from depo_gateway.training.evaluation.risk_control import Guarantee
from depo_gateway.training.evaluation.routing_metrics import at_thresholds

TARGETS = ("large-share", "quality", "cost", "loss")
TARGET_TOLERANCE = 0.01  # a share further from its target, or a quality further below it, is reported as not met


def parse_target(target: str) -> tuple[str, float]:
    """ "large-share=0.3" -> ("large-share", 0.3)."""
    name, equals, value = target.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if name not in TARGETS or not equals or not 0 <= number <= 1:
        raise ValueError(
            f"target {target!r} is none of {', '.join(f'{known}=X' for known in TARGETS)} with X from 0 to 1"
        )
    return name, number


def parse_costs(costs: Sequence[str], pools: tuple[str, ...]) -> tuple[float, ...] | None:
    """["small=1", "large=5"] -> costs in pool order; None if none are given."""
    if not costs:
        return None
    given: dict[str, float] = {}
    for cost in costs:
        name, _, value = cost.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            raise ValueError(f"cost {cost!r} is not of the form NAME=NUMBER") from None
    if set(given) != set(pools) or not all(0 < cost < float("inf") for cost in given.values()):
        raise ValueError(f"--costs must give each of {', '.join(pools)} a cost above 0")
    return tuple(given[pool] for pool in pools)


def thresholds_of(
    calibrated: Calibration,
    targets: Sequence[tuple[str, float]],
    costs: tuple[float, ...] | None,
    by_tokens: Calibration | None = None,
) -> dict[str, dict[str, float]]:
    """{"large-share=0.3": {rule: threshold}} of all targets but loss, which curves do not answer.

    `by_tokens`: the calibration with shares of tokens instead of calls, used for cost targets.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in targets:
        if name == "loss":
            continue
        of = calibrated if by_tokens is None or name != "cost" else by_tokens
        wanted = {name.replace("-", "_"): value}
        found[f"{name}={value:g}"] = {rule: of.threshold(rule, costs=costs, **wanted) for rule in of.curves}
    return found


def guaranteed_thresholds(guarantees: Mapping[str, Mapping[str, Guarantee]]) -> dict[str, dict[str, float]]:
    """{"loss=0.02@0.95": {rule: threshold}} of the rules that passed."""
    return {
        target: {rule: one.threshold for rule, one in by_rule.items() if one.passed}
        for target, by_rule in guarantees.items()
    }


def loss_target_name(epsilon: float, delta: float) -> str:
    """ "loss=0.02@0.95": the probability of a loss above 0.02 is at most 5%."""
    return f"loss={epsilon:g}@{1 - delta:g}"


def guarantee_lines(guarantees: Mapping[str, Mapping[str, Guarantee]], last: str) -> str:
    """What is guaranteed, one line per target and rule. `last`: the last pool's name."""
    return "".join(
        f"{target} under {rule}: {_guarantee_text(found, last)}\n"
        for target, by_rule in guarantees.items()
        for rule, found in by_rule.items()
    )


def _guarantee_text(found: Guarantee, last: str) -> str:
    tested = f"on the {found.prompts} prompts it was tested on"
    if not found.passed:
        return (
            f"nothing can be guaranteed: even at threshold 1, where {1 - found.large_share:.1%} of the calls go to"
            f" cheaper pools, the loss {tested} ({found.loss:.3f}) is not shown to be that low; rule difficulty at"
            f" threshold 1 sends everything to {last}"
        )
    if found.large_share == 1.0:
        return f"nothing passes {tested} but threshold {found.threshold:.4f}, which sends everything to {last}"
    return (
        f"threshold {found.threshold:.4f} saves {1 - found.large_share:.1%} of the calls to {last}; the loss {tested}"
        f" is {found.loss:.4f} (p {found.p_value:.2g})"
    )


def target_summary(
    calibrated: Calibration, quality_NK: Array, observed_NK: Array, units: int, by_curve: bool = False
) -> str:
    """A table of the thresholds found and their effect on the rows they were found on, and the targets not met.

    `units`: the number of independent prompts or conversations, which the intervals of the shares follow from.
    `by_curve`: quality is the curve's, which uses partial labels too, instead of that of rows with all labels.
    """
    complete = np.asarray(~np.isnan(observed_NK).any(1))
    rows, missed = [], ""
    for target, by_rule in calibrated.targets.items():
        name, wanted = parse_target(target.partition("@")[0])
        for rule, threshold in by_rule.items():
            share = large_share_at(quality_NK, rule, threshold)
            if name == "large-share" and abs(share - wanted) > TARGET_TOLERANCE:
                missed += f"{target} is not met under {rule}: the nearest threshold gives {share:.3f}\n"
            low, high = share_interval(share, units)
            cells = [target, rule, f"{threshold:.4f}", f"{share:.3f} [{low:.3f}, {high:.3f}]", "", ""]
            reached = _quality(calibrated, quality_NK, observed_NK, complete, rule, threshold, by_curve)
            if reached is not None:
                quality, all_large = reached
                cells[4:] = [f"{quality:.3f}", f"{all_large:.3f}"]
                if name == "quality" and quality < (wanted - TARGET_TOLERANCE) * all_large:
                    missed += f"{target} is not met under {rule}: the nearest threshold gives"
                    missed += f" {quality / all_large:.3f}\n"
            rows.append(cells)
    if not rows:
        return ""
    header = ("target", "rule", "threshold", "large share, 95% interval", "quality", "all large")
    return table(rows, header) + "\n" + missed


def _quality(
    calibrated: Calibration,
    quality_NK: Array,
    observed_NK: Array,
    complete: NDArray[np.bool_],
    rule: str,
    threshold: float,
    by_curve: bool,
) -> tuple[float, float] | None:
    """Mean quality at a threshold and of the last pool; None where it is unknown."""
    curve = calibrated.curves[rule]
    if by_curve and curve.quality is not None and curve.all_large is not None:
        return float(np.interp(threshold, curve.thresholds, curve.quality)), curve.all_large
    if not complete.any() or len(calibrated.pools) < 2:
        return None
    (at,) = at_thresholds(quality_NK[complete], observed_NK[complete], rule, (threshold,))
    return at["quality"], float(observed_NK[complete, -1].mean())


def large_share_at(quality_NK: Array, rule: str, threshold: float) -> float:
    """Share of prompts that the last pool serves or, with one pool, whose confidence is below the threshold."""
    if quality_NK.shape[1] == 1:
        return float((calibration.confidence(quality_NK, rule)[:, 0] < threshold).mean())
    return float((calibration.route(quality_NK, rule, threshold) == quality_NK.shape[1] - 1).mean())
