"""Importance weights for covariate shift: down-weights old examples unlike the newest traffic.

If the newest prompts can't be distinguished from the older ones, all weights are 1. Otherwise an older example weighs
by the density ratio that a classifier of embeddings gives (Shimodaira, 2000), times the mean ratio of the old traffic,
and never less than LEAST_WEIGHT: a change of traffic also changes what similar prompts mean.

Shapes: N examples in order of time, D encoder width, F folds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.logistic import fit_logistic

NEWEST_PROMPTS = 250  # that represent today's traffic, or a quarter of all
FEWEST_PROMPTS = 50  # of them; with fewer the weights stay 1
UNCHANGED_RATIO = 0.5  # mean density ratio from which on traffic counts as unchanged: within one stream it is about .8
LEAST_WEIGHT = 0.1
SHIFT_FOLDS, NEWTON_STEPS = 5, 8
RIDGE = 10.0  # on features whose squares sum to about 9
FEATURE_LENGTH = 3.0


def importance_weights(embeddings_ND: Array, seed: int = 0) -> Array:
    """The factor on each example's weight (N,): 1 for the newest, LEAST_WEIGHT to 1 for the older ones."""
    count = len(embeddings_ND)
    newest = min(NEWEST_PROMPTS, count // 4)
    if newest < FEWEST_PROMPTS:
        return np.ones(count)
    new_N = np.arange(count) >= count - newest
    centred = embeddings_ND - embeddings_ND.mean(0)
    features = FEATURE_LENGTH * centred / (embeddings_ND.std(0) + 1e-3) / embeddings_ND.shape[1] ** 0.5
    folds = np.random.default_rng(seed).permutation(count) % SHIFT_FOLDS
    odds = np.zeros(count)
    for fold in range(SHIFT_FOLDS):
        holdout = folds == fold
        odds[holdout] = _design(features[holdout]) @ _fit_classifier(_design(features[~holdout]), new_N[~holdout])
    ratio = np.exp(np.minimum(odds, 0.0))  # the classes weigh alike, so the odds are the density ratio
    mean_ratio = float(ratio[~new_N].mean())
    if mean_ratio >= UNCHANGED_RATIO:
        return np.ones(count)
    return np.where(new_N, 1.0, np.maximum(LEAST_WEIGHT, mean_ratio * ratio))


def _design(features: Array) -> Array:
    return np.concatenate([features, np.ones((len(features), 1))], 1)


def _fit_classifier(design: Array, new: NDArray[np.bool_]) -> Array:
    """Logistic ridge; both classes weigh half of all. The intercept is free."""
    weights = np.where(new, 0.5 / new.mean(), 0.5 / (1 - new.mean()))
    penalty = np.full(design.shape[1], RIDGE)
    penalty[-1] = 1e-6
    start = np.zeros(design.shape[1])
    return fit_logistic(
        design, new.astype(float), weights, start, penalty, steps=NEWTON_STEPS, longest=np.inf, tolerance=0.0
    )
