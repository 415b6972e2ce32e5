"""How the served router performs on recent labels: its advantage over random routing, for standing.json. Pure.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.logistic import Array
from depo_gateway.estimator.standing import Standing
from depo_gateway.training.online.publish_gate import area_over_random, bootstrap_interval, resampled, routing_score

STANDING_PROMPTS, STANDING_EVIDENCE, STANDING_RESAMPLES = 300, 100, 1000
STANDING_LEVEL = 0.8  # two-sided


def standing_of(
    version: str, time: float, quality: Array, observed: Array, folds: NDArray[np.int64] | None, large_share: float
) -> Standing | None:
    """The standing on recent prompts with labels of every pool, which the router was not fitted on; None without any.

    The advantage over random routing at the same share of each pool is averaged over all shares. `beats_random` is
    False only on evidence: with STANDING_EVIDENCE labels if the one-sided 90% upper bound is 0 or less, with three
    times as many if the estimate is.
    """
    rows = np.flatnonzero(~np.isnan(observed[:, [0, -1]]).any(1))[-STANDING_PROMPTS:]
    if not len(rows):
        return None
    gain = observed[rows, -1] - observed[rows, 0]
    score = routing_score(quality, folds)[rows]
    point = float(area_over_random(score, gain, np.ones((1, len(rows))))[0])
    advantage = bootstrap_interval(
        point, area_over_random(score, gain, resampled(len(rows), STANDING_RESAMPLES, 0)), STANDING_LEVEL
    )
    no_better = (len(rows) >= STANDING_EVIDENCE and advantage.high <= 0) or (
        len(rows) >= 3 * STANDING_EVIDENCE and point <= 0
    )
    return Standing(version, time, len(rows), point, advantage.low, advantage.high, not no_better, large_share)
