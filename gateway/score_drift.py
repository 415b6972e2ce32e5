"""How far live confidences have come from those that the checkpoint was calibrated on."""

import math
from collections import deque

import numpy as np

from depo_gateway.estimator.calibration import Curve

DRIFT_WINDOW = 2000
ENOUGH = 200  # below it the distance is mostly chance: of 200 alike its 95th percentile is .096, of 2,000 .030
EVERY = 50


class ScoreDrift:
    """The Kolmogorov-Smirnov distance between the last WINDOW confidences and a calibration's."""

    def __init__(self, curve: Curve | None) -> None:
        """`curve`: None where the checkpoint has none for this rule and these pools; then the distance stays NaN."""
        self.distance = math.nan  # in [0, 1]; NaN: too few so far
        self._curve = curve
        self._seen: deque[float] = deque(maxlen=DRIFT_WINDOW)
        self._count = 0

    def saw(self, confidence: float) -> None:
        """One confidence of the full stage, among all pools, which is what the curve was measured with."""
        self._seen.append(confidence)
        self._count += 1
        if self._curve is not None and self._count >= ENOUGH and self._count % EVERY == 0:
            self.distance = distance(self._curve, self._seen)


def distance(curve: Curve, confidences: "deque[float]") -> float:
    """The largest gap between both distribution functions, at the curve's thresholds.

    The last pool's share at a threshold is the share of the calibration's confidences below it.
    """
    below = np.array([row[-1] for row in curve.shares])
    live = np.searchsorted(np.sort(np.array(confidences)), np.array(curve.thresholds), side="left") / len(confidences)
    return float(np.abs(live - below).max())
