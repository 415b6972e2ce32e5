"""Fits the calibration of an estimator's logits to labels: probabilities, and the curves for finding thresholds.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import numpy as np

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Array, Calibration, Curve, Stage, apply_calibration, fit_platt


def calibrate(
    full: Array,
    cheap: Array,
    t_NK: Array,
    d_NK: Array,
    weights: Array,
    pools: tuple[str, ...],
    parent: Calibration | None = None,
    counts: Array | None = None,
) -> Calibration:
    """Calibration from logits (N, K, 2) of both stages and labels, NaN where there is none.

    With a parent, outputs without enough labels keep the parent's calibration: token confidence pool by pool, quality
    of all pools together, because qualities are compared with each other. `counts` (N,): the weight of each prompt in
    the shares and quality of a curve, if not `weights`.
    """
    stages = {}
    for name, logits in (("full", full), ("cheap", cheap)):
        quality, token = (
            tuple(fit_platt(logits[:, k, head], labels_NK[:, k], weights) for k in range(len(pools)))
            for head, labels_NK in enumerate((t_NK, d_NK))
        )
        if parent is not None:
            before = parent.stages[name]
            if pools_lacking_labels(t_NK, weights, pools):
                quality = before.quality
            lacking = pools_lacking_labels(d_NK, weights, pools)
            token = tuple(
                old if pool in lacking else new
                for pool, old, new in zip(pools, before.token_confidence, token, strict=True)
            )
        stages[name] = Stage(quality, token)
    quality_NK, _ = apply_calibration(stages["full"], full)
    return Calibration(pools, stages, rule_curves(quality_NK, t_NK, weights if counts is None else counts, pools))


def rule_curves(quality_NK: Array, observed_NK: Array, counts: Array, pools: tuple[str, ...]) -> dict[str, Curve]:
    """Each rule's curve on prompts of weight `counts` (N,)."""
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return {rule: calibration.measure_curve(quality_NK, observed_NK, counts, rule) for rule in rules}


def pools_lacking_labels(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough_labels(labels_NK[:, k], weights)]


def unchanged_message(observed_NK: Array, token_NK: Array, pools: tuple[str, ...], weights: Array | None = None) -> str:
    """Which outputs calibrate() left to the parent, and why; one line each."""
    weights = np.ones(len(observed_NK)) if weights is None else weights
    why = f"fewer than {calibration.MIN_LABELS} labels, or all labels are equal"
    lines = ""
    if lacking := pools_lacking_labels(observed_NK, weights, pools):
        lines += f"The calibration of quality of {', '.join(pools)} is unchanged: {why}, for {', '.join(lacking)}\n"
    if lacking := pools_lacking_labels(token_NK, weights, pools):
        lines += f"The calibration of token confidence of {', '.join(lacking)} is unchanged: {why}\n"
    return lines
