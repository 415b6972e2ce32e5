"""How a report's figures were measured, in words, and the rows of its curve.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.headline import MAX_LOSS, MIN_SAVING, points, route_figures, threshold_text
from depo_gateway.training.evaluation.reported_routing import ReportedRouting
from depo_gateway.training.evaluation.threshold_sweep import Sweep, interval_rows


def sweep_rows(
    sweep: Sweep | None,
    quality_NK: Array,
    routing: ReportedRouting,
    thresholds: Array,
    tokens: Array,
    pools: Sequence[str],
) -> list[dict[str, Any]]:
    """The curve's rows for report.json; without a measured quality, shares and costs."""
    if sweep is not None:
        return interval_rows(sweep)
    return [route_figures(quality_NK, routing, float(threshold), tokens, pools) for threshold in thresholds]


def models_note(models: Mapping[str, Sequence[str]]) -> str:
    """ "small is a; large is the mean of 3 models."."""
    named = [
        f"{pool} is {found[0] if len(found) == 1 else f'the mean of {len(found)} models'}"
        for pool, found in models.items()
        if list(found) != [pool]
    ]
    return "; ".join(named) + "." if named else ""


def model_lists(models: Mapping[str, Sequence[str]]) -> list[str]:
    """The models of each pool that is a mean of several."""
    return [f"The models whose mean is {pool}: {', '.join(found)}." for pool, found in models.items() if len(found) > 1]


def fitted_note(figures: Mapping[str, Any], scores: str) -> str:
    """What was left out because the checkpoint was fitted on it, or why that is not known."""
    if figures["fitted_share"] is None and not any(figures["left_out"].values()):
        return (
            "The checkpoint does not record which prompts it was fitted on; results on those would be optimistic, and"
            " none were left out."
        )
    left = figures["left_out"]
    notes = []
    if left["fitted"]:
        notes.append(f"{left['fitted']} prompts were left out because the checkpoint was fitted on them")
    if left["unknown"]:
        notes.append(
            f"{left['unknown']} prompts were left out because it may have been fitted on them: it records a sample only"
        )
    if notes:
        return f"{'; '.join(notes)} (--include-fitted includes them; {scores} has every prompt)."
    if figures["fitted_share"]:
        share = f"{figures['fitted_share']:.1%}"
        return f"The checkpoint was fitted on {share} of these prompts; results on those are optimistic."
    return "The checkpoint was fitted on none of them."


def routing_note(routing: ReportedRouting, pools: Sequence[str], assumption: str) -> str:
    """Where the threshold in force and the costs come from."""
    note = (
        f"The threshold in force is {threshold_text(routing.threshold)} under rule {routing.rule} ({routing.source})."
    )
    if len(pools) == 1:
        return note
    if routing.costs is None:
        example = " ".join(f"{pool}=X" for pool in pools)
        return f"{note} No costs are known: give --costs {example}, or --config gateway.yaml, to see what is saved."
    costs = ", ".join(f"{pool} {cost:g}" for pool, cost in zip(pools, routing.costs, strict=True))
    return f"{note} Costs per token: {costs}; {assumption}."


def definitions(units: str, few: int) -> list[str]:
    """The rules behind the first page."""
    margin = points(MAX_LOSS)
    return [
        f"Intervals cover 95% and come from a bootstrap that resamples {units}; a ratio or a difference is resampled as"
        " such, both parts on the same resamples. Rounded figures may differ from their sums by one in the last digit."
        f" With fewer than {few} labelled prompts or effective records no quality is claimed.",
        "The cheaper threshold is the lowest that is reached from the one in force, step by step down, while the upper"
        f" end of the interval of the loss stays at or below {margin} points of the last pool's quality; it is named if"
        f" it saves {points(MIN_SAVING)} points or more. Where there is none, nothing cheaper is shown to keep as much,"
        " and a dearer threshold is named if it is shown to gain: the lowest, step by step from the top, that is shown"
        f" to lose at most {margin} points against the last pool. Steps are spaced by share, not by outcomes.",
    ]
