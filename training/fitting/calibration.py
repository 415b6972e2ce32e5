"""Calibration of an estimator's logits on labels: probabilities, and the curves that thresholds are found on.

Shapes: N prompts, K pools cheapest first, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Calibration, Curve, Platt, Stage, calibrate_quality, fit_platt
from depo_gateway.training.evaluation.routing_metrics import Array


def calibrate(
    full: Array,
    cheap: Array,
    labels: Mapping[str, Array],
    weights: Array,
    pools: tuple[str, ...],
    parent: Calibration | None = None,
    counts: Array | None = None,
) -> Calibration:
    """Calibration from logits (N, K, H) of both stages and labels (N, K) by head, in the model's order; NaN: no label.

    With a parent, what lacks labels keeps the parent's calibration: the qualities of all pools together, since they are
    compared with one another; of the other heads each pool by itself, and a head that `labels` does not name.
    `counts` (N,): what each prompt counts for in shares and in the quality of a curve, if that is not its weight.
    """
    stages: dict[str, Stage] = {}
    for name, logits in (("full", full), ("cheap", cheap)):
        stage = {} if parent is None else dict(parent.stages[name])
        for index, (head, labels_NK) in enumerate(labels.items()):
            fitted = tuple(fit_platt(logits[:, k, index], labels_NK[:, k], weights) for k in range(len(pools)))
            if parent is not None:
                fitted = _completed(head, fitted, stage[head], lacking(labels_NK, weights, pools), pools)
            stage[head] = fitted
        stages[name] = stage
    quality_NK = calibrate_quality(stages["full"], full)
    counts = weights if counts is None else counts
    return Calibration(pools, stages, curves(quality_NK, labels["quality"], counts, pools))


def _completed(
    head: str, fitted: tuple[Platt, ...], before: tuple[Platt, ...], short: list[str], pools: tuple[str, ...]
) -> tuple[Platt, ...]:
    """A head's calibration, the parent's (`before`) where a pool is `short` of labels."""
    if head == "quality":
        return before if short else fitted
    return tuple(old if pool in short else new for pool, old, new in zip(pools, before, fitted, strict=True))


def curves(quality_NK: Array, observed_NK: Array, counts: Array, pools: tuple[str, ...]) -> dict[str, Curve]:
    """Each rule's curve on prompts that count `counts` (N,)."""
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return {rule: calibration.measure_curve(quality_NK, observed_NK, counts, rule) for rule in rules}


def lacking(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough_labels(labels_NK[:, k], weights)]


def kept(labels: Mapping[str, Array], pools: tuple[str, ...], weights: Array) -> str:
    """What calibrate() left as it was, and why, a line each."""
    why = f"fewer than {calibration.MIN_LABELS} labels, or all alike"
    lines = ""
    for head, labels_NK in labels.items():
        if short := lacking(labels_NK, weights, pools):
            named = f"{why}, for {', '.join(short)}" if head == "quality" else why
            of = pools if head == "quality" else short
            title = head.replace("_", " ").capitalize()
            lines += f"{title} of {', '.join(of)} stays calibrated as it was: {named}\n"
    return lines
