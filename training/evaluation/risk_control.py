"""Risk control: the threshold with the largest saving whose loss of quality is proven to be small. Pure.

Learn-then-Test (Angelopoulos et al. 2021, arXiv 2110.01052): each threshold of a grid is a hypothesis "its mean loss
exceeds epsilon", tested on prompts with every pool's outcome. The hypotheses are tested in a fixed order, from the
safest threshold down, until the first that cannot be rejected. With probability 1 - delta no threshold that passed then
exceeds epsilon, however many there are. Each test is a bet against its hypothesis (Waudby-Smith and Ramdas 2020, arXiv
2010.09686): where the mean loss exceeds epsilon, no betting strategy multiplies the capital by 1 / delta with a
probability above delta (Ville's inequality). Unlike Hoeffding's bound it benefits from losses of small variance.

The guarantee holds for traffic exchangeable with the tested prompts, for a grid and scores that do not depend on those
prompts, and for one use of them.

Shapes: N prompts, K pools cheapest first, T thresholds from the safest down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import confidence, route

GRID_STEPS = 100  # the saving found is within 1% of the calls of the best one that would pass
MAX_STAKE = 0.75  # of the stake at which one observation could take all the capital


@dataclass(frozen=True, slots=True)
class Guarantee:
    """The result for one rule. If not `passed`, `threshold` is 1 and nothing is guaranteed."""

    epsilon: float
    delta: float
    passed: bool
    threshold: float
    loss: float  # mean observed loss at the threshold, on the prompts tested
    p_value: float  # of "the mean loss at the threshold exceeds epsilon"
    large_share: float
    prompts: int


def threshold_grid(quality_NK: Array, rule: str) -> Array:
    """Thresholds (T,) from 1 down; at each, another 1% of these prompts leave the last pool.

    These prompts must not be used by the test. Their outcomes are not needed.
    """
    decisive = confidence(quality_NK, rule)[:, : max(1, quality_NK.shape[1] - 1)].max(1)
    levels = np.quantile(decisive, np.linspace(0.0, 1.0, GRID_STEPS + 1))
    return np.unique(np.concatenate([[0.0, 1.0], levels]).clip(0.0, 1.0))[::-1]


def p_values(losses_NT: Array, epsilon: float, delta: float) -> Array:
    """P values (T,) of "the mean of this column of losses, each in [-1, 1], is above epsilon", by betting.

    Rows are taken in order, and each bet is made before its loss is seen: after i losses the stake is
    sqrt(2 log(1 / delta) / (N variance_i)), the optimal one for N losses. The p value is one over the maximum of the
    capital.
    """
    count = len(losses_NT)
    mean = (1.0 + epsilon) / 2.0
    z = (1.0 + losses_NT) / 2.0  # in [0, 1]
    seen = np.arange(1, count + 1)[:, None]
    means = (0.5 + np.cumsum(z, 0)) / (seen + 1)
    variances = (0.25 + np.cumsum((z - means) ** 2, 0)) / (seen + 1)
    before = np.concatenate([np.full((1, z.shape[1]), 0.25), variances[:-1]])
    stakes = np.minimum(np.sqrt(2.0 * np.log(1.0 / delta) / (count * before)), MAX_STAKE / (1.0 - mean))
    log_capital = np.cumsum(np.log1p(-stakes * (z - mean)), 0)
    return np.asarray(np.exp(-np.maximum(log_capital.max(0), 0.0)))


def guarantee(
    quality_NK: Array, observed_NK: Array, rule: str, thresholds: Array, epsilon: float, delta: float, seed: int = 0
) -> Guarantee:
    """The lowest of `thresholds` (T,), safest first, with it and all before it at a mean loss of at most epsilon.

    The loss of a prompt is the last pool's outcome minus the outcome of the pool that serves it.

    Args:
        quality_NK: predicted, by an estimator not fitted on these prompts. observed_NK: every pool's outcome in [0, 1].
        seed: of the random order in which prompts are tested, because tables may be sorted by subject.
    """
    assert not np.isnan(observed_NK).any(), "a guarantee needs every pool's outcome"
    order = np.random.default_rng(seed).permutation(len(observed_NK))
    quality_NK, observed_NK = quality_NK[order], observed_NK[order]
    last = observed_NK.shape[1] - 1
    rows = np.arange(len(observed_NK))
    routes = np.stack([route(quality_NK, rule, float(threshold)) for threshold in thresholds], 1)
    losses_NT = observed_NK[:, last, None] - np.stack([observed_NK[rows, pool] for pool in routes.T], 1)
    p = p_values(losses_NT, epsilon, delta) if len(rows) else np.ones(len(thresholds))
    p = np.where((routes == last).all(0), 0.0, p)  # serving from the last pool has no loss
    failed = np.flatnonzero(p > delta)
    at = (int(failed[0]) if len(failed) else len(thresholds)) - 1
    shown = max(at, 0)
    return Guarantee(
        epsilon,
        delta,
        at >= 0,
        float(thresholds[shown]),
        float(losses_NT[:, shown].mean()) if len(rows) else float("nan"),
        float(p[shown]),
        float((routes[:, shown] == last).mean()) if len(rows) else float("nan"),
        len(rows),
    )
