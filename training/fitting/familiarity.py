"""From how far on a prompt counts as unfamiliar: quantiles of held-out distances of the fitted prompts.

Shapes: N fitted prompts, K pools.
"""

from __future__ import annotations

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Familiarity

# Shares of prompts like the fitted ones that are nearer. Beyond FAR routing is at random, so 3 in 100 of the fit's own
# kind lose their prediction; benchmarks/unfamiliar.py shows what other kinds gain. Between the two, half-trusted gains
# would gather in the middle of the ranking, so there is little between
NEAR, FAR = 0.95, 0.97
EXTREME = 0.01  # a pool's mean quality is kept this far from 0 and 1, where its logit would be infinite


def familiarity_of(distances_N: Array, labels_NK: Array, weights_N: Array) -> Familiarity:
    """The bounds of familiarity and the pools' mean quality. NaN: no label; a pool without any has the mean 0.5."""
    near, far = weighted_quantiles(distances_N, weights_N, (NEAR, FAR))
    return Familiarity(near, far, pool_means(labels_NK, weights_N))


def pool_means(labels_NK: Array, weights_N: Array) -> tuple[float, ...]:
    """Each pool's mean label (K,), 0.5 without one."""
    means = []
    for labels in labels_NK.T:
        seen = ~np.isnan(labels) & (weights_N > 0)
        mean = float(np.average(labels[seen], weights=weights_N[seen])) if seen.any() else 0.5
        means.append(min(max(mean, EXTREME), 1.0 - EXTREME))
    return tuple(means)


def weighted_quantiles(values_N: Array, weights_N: Array, shares: tuple[float, ...]) -> tuple[float, ...]:
    """The lowest value up to which each share of the weight lies."""
    order = np.argsort(values_N, kind="stable")
    reached = np.cumsum(weights_N[order])
    places = np.searchsorted(reached, np.array(shares) * reached[-1])
    return tuple(float(values_N[order[min(place, len(order) - 1)]]) for place in places.tolist())
