"""Figures computed from the runs' histories. Pure functions.

Shapes: R rows of a history, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# two-sided 95% quantiles of Student's t by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def smoothed(values_R: Sequence[float]) -> list[float]:
    """Each value averaged with its neighbours, to reduce the noise of evaluations. The first one stays."""
    means = [float(np.mean(values_R[max(0, i - 1) : i + 2])) for i in range(len(values_R))]
    return [*values_R[:1], *means[1:]]


def reached(x_R: Sequence[float], y_R: Sequence[float], level: float) -> float | None:
    """Where the line through the points first reaches `level`; None if it does not."""
    if y_R[0] >= level:
        return float(x_R[0])
    for (x0, y0), (x1, y1) in zip(zip(x_R, y_R, strict=True), zip(x_R[1:], y_R[1:], strict=False), strict=False):
        if y0 < level <= y1:
            return float(x0 + (level - y0) / (y1 - y0) * (x1 - x0))
    return None


def interval(values_S: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval by Student's t, which is NaN for a single value."""
    values = np.asarray(values_S, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = STUDENT.get(len(values) - 1, 1.96) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def ratio(mine_S: Sequence[float], theirs_S: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean over seeds of mine / theirs, paired by seed, with its 95% interval."""
    logs = np.log(np.asarray(mine_S, float)) - np.log(np.asarray(theirs_S, float))
    mean, low, high = interval(logs.tolist())
    return math.exp(mean), math.exp(low), math.exp(high)


def at(x_R: Sequence[float], y_R: Sequence[float], x_N: Array) -> Array:
    """The line through the points, at x_N."""
    return np.interp(x_N, x_R, y_R)
