"""Fits the calibration of an estimator's logits to labels: probabilities, and the curves for finding thresholds.

Shapes: N prompts, K pools cheapest first, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration, Curve, Platt, Stage, calibrate_quality, fit_platt
from depo_gateway.training.fitting.familiarity import pool_means


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

    With a parent, outputs without enough labels keep the parent's calibration: quality of all pools together, because
    qualities are compared with each other; the other heads pool by pool; and heads that `labels` does not name. The
    parent's familiarity is kept, its means with the quality: they are the labels' where quality is refitted.
    `counts` (N,): the weight of each prompt in the shares and quality of a curve, if not `weights`.
    """
    stages: dict[str, Stage] = {}
    for name, logits in (("full", full), ("cheap", cheap)):
        stage = {} if parent is None else dict(parent.stages[name])
        for index, (head, labels_NK) in enumerate(labels.items()):
            fitted = tuple(fit_platt(logits[:, k, index], labels_NK[:, k], weights) for k in range(len(pools)))
            if parent is not None:
                lacking = pools_lacking_labels(labels_NK, weights, pools)
                fitted = _completed(head, fitted, stage[head], lacking, pools)
            stage[head] = fitted
        stages[name] = stage
    quality_NK = calibrate_quality(stages["full"], full)
    counts = weights if counts is None else counts
    familiarity = None if parent is None else parent.familiarity
    if familiarity is not None and not pools_lacking_labels(labels["quality"], weights, pools):
        familiarity = replace(familiarity, means=pool_means(labels["quality"], weights))
    curves = rule_curves(quality_NK, labels["quality"], counts, pools)
    return Calibration(pools, stages, curves, familiarity=familiarity)


def _completed(
    head: str, fitted: tuple[Platt, ...], before: tuple[Platt, ...], lacking: list[str], pools: tuple[str, ...]
) -> tuple[Platt, ...]:
    """A head's calibration, with the parent's (`before`) for pools that lack labels."""
    if head == "quality":
        return before if lacking else fitted
    return tuple(old if pool in lacking else new for pool, old, new in zip(pools, before, fitted, strict=True))


def rule_curves(quality_NK: Array, observed_NK: Array, counts: Array, pools: tuple[str, ...]) -> dict[str, Curve]:
    """Each rule's curve on prompts of weight `counts` (N,)."""
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return {rule: calibration.measure_curve(quality_NK, observed_NK, counts, rule) for rule in rules}


def pools_lacking_labels(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough_labels(labels_NK[:, k], weights)]


def unchanged_message(labels: Mapping[str, Array], pools: tuple[str, ...], weights: Array) -> str:
    """Which outputs calibrate() left to the parent, and why; one line each."""
    why = f"fewer than {calibration.MIN_LABELS} labels, or all labels are equal"
    lines = ""
    for head, labels_NK in labels.items():
        if lacking := pools_lacking_labels(labels_NK, weights, pools):
            reason = f"{why}, for {', '.join(lacking)}" if head == "quality" else why
            of = ", ".join(pools if head == "quality" else lacking)
            lines += f"The calibration of {head.replace('_', ' ')} of {of} is unchanged: {reason}\n"
    return lines
