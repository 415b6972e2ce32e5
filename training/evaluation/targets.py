"""Targets and the thresholds that meet them: a share, a quality, a cost, or a bound on the loss with a guarantee.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.training.evaluation.risk_control import Guarantee
from depo_gateway.training.evaluation.routing_metrics import Array, at_thresholds, table

TARGETS = ("large-share", "quality", "cost", "loss")
MISSED = 0.01  # a share that differs more from the wanted one, or a quality that falls shorter of it, is told


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
    """{"large-share=0.3": {rule: threshold}} of the targets that a curve meets, which loss is not one of.

    `by_tokens`: the same with shares of tokens instead of calls, which a cost is a matter of.
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in targets:
        if name == "loss":
            continue
        of = calibrated if by_tokens is None or name != "cost" else by_tokens
        wanted = {name.replace("-", "_"): value}
        found[f"{name}={value:g}"] = {rule: of.threshold(rule, costs=costs, **wanted) for rule in of.curves}
    return found


def guaranteed(guarantees: Mapping[str, Mapping[str, Guarantee]]) -> dict[str, dict[str, float]]:
    """{"loss=0.02@0.95": {rule: threshold}} of the rules for which there is one."""
    return {
        target: {rule: one.threshold for rule, one in by_rule.items() if one.passed}
        for target, by_rule in guarantees.items()
    }


def name_of_loss(epsilon: float, delta: float) -> str:
    """ "loss=0.02@0.95": a loss above 0.02 has a chance of 5% at most."""
    return f"loss={epsilon:g}@{1 - delta:g}"


def told(guarantees: Mapping[str, Mapping[str, Guarantee]], last: str) -> str:
    """What was guaranteed, a line each. `last`: the dearest pool's name."""
    lines = ""
    for target, by_rule in guarantees.items():
        for rule, one in by_rule.items():
            tested = f"on the {one.prompts} prompts it was tested on"
            if not one.passed:
                lines += f"{target} under {rule}: nothing can be guaranteed: even at threshold 1, which leaves"
                lines += f" {1 - one.large_share:.1%} of the calls to cheaper pools, the loss {tested} ({one.loss:.3f})"
                lines += " is not shown to be that low; rule difficulty at threshold 1 sends everything to"
                lines += f" {last}\n"
            elif one.large_share == 1.0:
                lines += f"{target} under {rule}: nothing passes {tested} but threshold"
                lines += f" {one.threshold:.4f}, which sends everything to {last}\n"
            else:
                lines += f"{target} under {rule}: threshold {one.threshold:.4f} saves {1 - one.large_share:.1%} of the"
                lines += f" calls to {last}; the loss {tested} is {one.loss:.4f} (p {one.p_value:.2g})\n"
    return lines


def summary(calibrated: Calibration, quality_NK: Array, observed_NK: Array, by_curve: bool = False) -> str:
    """The thresholds found and what they do on the rows they were found on.

    `by_curve`: quality as the curve has it, which stands on partial labels too, not as complete rows do.
    """
    complete = np.asarray(~np.isnan(observed_NK).any(1))
    rows, missed = [], ""
    for target, by_rule in calibrated.targets.items():
        name, wanted = parse_target(target.partition("@")[0])
        for rule, threshold in by_rule.items():
            share = large_share(quality_NK, rule, threshold)
            if name == "large-share" and abs(share - wanted) > MISSED:
                missed += f"{target} is not met under {rule}: the nearest threshold gives {share:.3f}\n"
            cells = [target, rule, f"{threshold:.4f}", f"{share:.3f}", "", ""]
            reached = _quality(calibrated, quality_NK, observed_NK, complete, rule, threshold, by_curve)
            if reached is not None:
                quality, all_large = reached
                cells[4:] = [f"{quality:.3f}", f"{all_large:.3f}"]
                if name == "quality" and quality < (wanted - MISSED) * all_large:
                    missed += f"{target} is not met under {rule}: the nearest threshold gives"
                    missed += f" {quality / all_large:.3f}\n"
            rows.append(cells)
    if not rows:
        return ""
    return table(rows, ("target", "rule", "threshold", "large share", "quality", "all large")) + "\n" + missed


def _quality(
    calibrated: Calibration,
    quality_NK: Array,
    observed_NK: Array,
    complete: NDArray[np.bool_],
    rule: str,
    threshold: float,
    by_curve: bool,
) -> tuple[float, float] | None:
    """Mean quality at a threshold and of the last pool; None where it isn't known."""
    curve = calibrated.curves[rule]
    if by_curve and curve.quality is not None and curve.all_large is not None:
        return float(np.interp(threshold, curve.thresholds, curve.quality)), curve.all_large
    if not complete.any() or len(calibrated.pools) < 2:
        return None
    (at,) = at_thresholds(quality_NK[complete], observed_NK[complete], rule, (threshold,))
    return at["quality"], float(observed_NK[complete, -1].mean())


def large_share(quality_NK: Array, rule: str, threshold: float) -> float:
    """Share of prompts that the last pool gets or, where there is one pool, that it is not sure of."""
    if quality_NK.shape[1] == 1:
        return float((calibration.confidence(quality_NK, rule)[:, 0] < threshold).mean())
    return float((calibration.route(quality_NK, rule, threshold) == quality_NK.shape[1] - 1).mean())
