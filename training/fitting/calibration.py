"""Calibration of an estimator's logits on labels: probabilities, and the curves that thresholds are found on.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import numpy as np

from depo_gateway.estimator import calibration
from depo_gateway.estimator.calibration import Calibration, Curve, Stage, apply_calibration, fit_platt
from depo_gateway.training.evaluation.routing_metrics import Array


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

    With a parent, what lacks labels keeps the parent's: a pool's token confidence by itself, but the qualities of all
    pools together, since they are compared with one another. `counts` (N,): what each prompt counts for in shares and
    in the quality of a curve, if that is not its weight.
    """
    stages = {}
    for name, logits in (("full", full), ("cheap", cheap)):
        quality, token = (
            tuple(fit_platt(logits[:, k, head], labels_NK[:, k], weights) for k in range(len(pools)))
            for head, labels_NK in enumerate((t_NK, d_NK))
        )
        if parent is not None:
            before = parent.stages[name]
            if lacking(t_NK, weights, pools):
                quality = before.quality
            short = lacking(d_NK, weights, pools)
            token = tuple(
                old if pool in short else new
                for pool, old, new in zip(pools, before.token_confidence, token, strict=True)
            )
        stages[name] = Stage(quality, token)
    quality_NK, _ = apply_calibration(stages["full"], full)
    return Calibration(pools, stages, curves(quality_NK, t_NK, weights if counts is None else counts, pools))


def curves(quality_NK: Array, observed_NK: Array, counts: Array, pools: tuple[str, ...]) -> dict[str, Curve]:
    """Each rule's curve on prompts that count `counts` (N,)."""
    rules = calibration.RULES if len(pools) > 1 else ("difficulty",)
    return {rule: calibration.measure_curve(quality_NK, observed_NK, counts, rule) for rule in rules}


def lacking(labels_NK: Array, weights: Array, pools: tuple[str, ...]) -> list[str]:
    """The pools without enough labels to calibrate."""
    return [pool for k, pool in enumerate(pools) if not calibration.enough_labels(labels_NK[:, k], weights)]


def kept(observed_NK: Array, token_NK: Array, pools: tuple[str, ...], weights: Array | None = None) -> str:
    """What calibrate() left as it was, and why, a line each."""
    weights = np.ones(len(observed_NK)) if weights is None else weights
    why = f"fewer than {calibration.MIN_LABELS} labels, or all alike"
    lines = ""
    if short := lacking(observed_NK, weights, pools):
        lines += f"Quality of {', '.join(pools)} stays calibrated as it was: {why}, for {', '.join(short)}\n"
    if short := lacking(token_NK, weights, pools):
        lines += f"Token confidence of {', '.join(short)} stays calibrated as it was: {why}\n"
    return lines
