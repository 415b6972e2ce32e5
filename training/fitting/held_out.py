"""Held-out predictions of a fit, and the loss by which its settings are chosen.

Shapes: N examples, K pools, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Item
from depo_gateway.estimator.logistic import sigmoid

# Variance of a share measured on held-out predictions, relative to that on independent prompts: each prompt has taught
# the models that the others were predicted by. With 1, intervals of 200 labels held in 92 to 93% on GSM8K, with this in
# 95% (benchmarks/thresholds.py)
DESIGN_EFFECT = 1.15


@dataclass(frozen=True, slots=True)
class HeldOutLogits:
    """Held-out logits of every example, (N, K, H) each."""

    full: Array
    cheap: Array


def held_out_loss(logits: Array, items: Sequence[Item], head: int = QUALITY) -> float:
    """The criterion of a fit's settings: squared error of quality differences, else of each pool's labels."""
    observed = np.array([item.labels[head] for item in items])
    weights = np.array([item.weight for item in items])
    predicted = sigmoid(logits[:, :, head])
    if head == QUALITY and observed.shape[1] > 1 and not np.isnan(np.diff(observed, axis=1)).all():
        predicted, observed = np.diff(predicted, axis=1), np.diff(observed, axis=1)
    error = (predicted - observed) ** 2
    return float(np.nansum(error * weights[:, None]) / (weights[:, None] * ~np.isnan(error)).sum())
