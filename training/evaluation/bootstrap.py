"""The bootstrap: units drawn with replacement, and percentile intervals of what the draws give. Pure.

A unit is whatever is independent of the others: a prompt, or a whole group or conversation. Callers compare two things
on the same draws, so that the interval of their difference is paired.

Shapes: U units, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array

DEFAULT_RESAMPLES = 500
TAIL_PERCENT = 2.5  # on each side of a 95% interval


def draw_counts(units: int, count: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """`count` times how often each unit is drawn (U,): one at a time, for a statistic that needs a resample's rows."""
    for _ in range(count):
        yield np.bincount(generator.integers(0, units, units), minlength=units)


def draw_count_matrix(units: int, count: int, generator: np.random.Generator) -> Array:
    """How often each unit is drawn (R, U): all at once, for a statistic that is a product with the counts."""
    matrix: Array = generator.multinomial(units, np.full(units, 1 / units), count).astype(float)
    return matrix


def percentile_interval(draws: Array, tail_percent: float = TAIL_PERCENT) -> tuple[float, float]:
    """The interval that leaves `tail_percent` of the draws (R,) out on each side. NaN draws do not count."""
    if np.isnan(draws).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(draws, [tail_percent, 100 - tail_percent])
    return float(low), float(high)
