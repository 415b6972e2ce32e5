"""What old labels still count for after traffic has changed: each as much as its prompt looks like the newest ones.

Where the newest prompts can't be told from the older ones nothing changes. Where they can, an older example weighs by
the ratio of densities that a classifier of embeddings gives (covariate shift: Shimodaira, 2000), once more by how much
of the old traffic is like that at all, and never less than LEAST: a switch also changes what similar words mean.

Shapes: N examples in order of time, D encoder width, F folds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.logistic import Array, fit_logistic

NEWEST = 250  # prompts that stand for today's traffic, or a quarter of all
FEWEST = 50  # of them; fewer tell nothing
SAME = 0.5  # from this mean likeness on traffic is taken as unchanged: of one stream it is about .8
LEAST = 0.1
FOLDS, STEPS = 5, 8
RIDGE = 10.0  # on features whose squares sum to about 9
LENGTH = 3.0


def likeness(embeddings_ND: Array, seed: int = 0) -> Array:
    """What each example's weight is multiplied by (N,): 1 for the newest, LEAST to 1 for the older ones."""
    count = len(embeddings_ND)
    newest = min(NEWEST, count // 4)
    if newest < FEWEST:
        return np.ones(count)
    new_N = np.arange(count) >= count - newest
    centred = embeddings_ND - embeddings_ND.mean(0)
    features = LENGTH * centred / (embeddings_ND.std(0) + 1e-3) / embeddings_ND.shape[1] ** 0.5
    folds = np.random.default_rng(seed).permutation(count) % FOLDS
    odds = np.zeros(count)
    for fold in range(FOLDS):
        aside = folds == fold
        odds[aside] = _designed(features[aside]) @ _fitted(_designed(features[~aside]), new_N[~aside])
    ratio = np.exp(np.minimum(odds, 0.0))  # the classes weigh alike, so the odds are the ratio of densities
    alike = float(ratio[~new_N].mean())
    if alike >= SAME:
        return np.ones(count)
    return np.where(new_N, 1.0, np.maximum(LEAST, alike * ratio))


def _designed(features: Array) -> Array:
    return np.concatenate([features, np.ones((len(features), 1))], 1)


def _fitted(design: Array, new: NDArray[np.bool_]) -> Array:
    """Logistic ridge; both classes weigh half of all. The intercept is free."""
    weights = np.where(new, 0.5 / new.mean(), 0.5 / (1 - new.mean()))
    penalty = np.full(design.shape[1], RIDGE)
    penalty[-1] = 1e-6
    start = np.zeros(design.shape[1])
    return fit_logistic(design, new.astype(float), weights, start, penalty, steps=STEPS, longest=np.inf, tolerance=0.0)
