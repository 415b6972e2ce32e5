"""95% interval of a share measured on a sample: of prompts that a pool gets, of verdicts that a position wins."""

from __future__ import annotations

from math import sqrt

from depo_gateway.estimator.arrays import Array

NORMAL_QUANTILE = 1.959964  # two-sided 95%


def effective_count(weights: Array) -> float:
    """Kish's effective sample size of weighted prompts: (sum w)^2 / sum w^2."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


def share_interval(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share measured on `count` independent prompts; (0, 1) for none.

    It covers the sampling of the prompts. What the model would have learned from other prompts need not be covered: the
    share is that of this model.
    """
    if count <= 0:
        return 0.0, 1.0
    z = NORMAL_QUANTILE**2 / count
    centre = (share + z / 2) / (1 + z)
    half = NORMAL_QUANTILE * sqrt(share * (1 - share) / count + z / (4 * count)) / (1 + z)
    # a share of 0 or 1 is its own end, which rounding errors would miss
    return 0.0 if share <= 0 else max(0.0, centre - half), 1.0 if share >= 1 else min(1.0, centre + half)


def share_text(share: float, count: float) -> str:
    """ "55% [51, 59]": a share with its interval, in percent."""
    low, high = share_interval(share, count)
    return f"{share:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
