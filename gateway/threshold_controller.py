"""routing.target: a threshold that follows live traffic, so that the spending stays at the target. Pure.

Every routed request moves a balance by `wanted - spent`: spent is 1 in the last pool and 0 elsewhere, or, for a cost,
the pool's price relative to the last one's. The balance sets the rank of the threshold among the confidences: the
wanted share while it is near 0, the lowest (all stay) at -REACH, the highest (all go to the last pool) at REACH. So the
balance never exceeds REACH + 1. As it telescopes, the spending of any n decisions differs from the target by at most
2 (REACH + 1) / n, whatever the traffic does: 1.3 points of 2,000. This is the online quantile update of adaptive
conformal inference (Gibbs and Candès 2021, arXiv 2106.00170, proposition 4.1) with a rank that is cubic in the balance
instead of linear: it hardly moves the threshold near balance 0, because a threshold that jitters costs quality.

Decisions that the threshold does not make (a conversation that keeps its pool, a fallback) move the balance too and are
compensated, up to LIMIT. The rest is dropped: otherwise the end of an outage would be followed by its opposite.

Compared with a fixed threshold at the right rank, 0.3 to 0.7% of routing's gain over random routing is lost (a linear
rank of step .03 loses 1.3 to 2.7%); the fixed one's share is off by up to 3 points in a window of unchanged traffic.
"""

import math
import random
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from depo_gateway.estimator.calibration import Curve

SHARE_WINDOW = 2000  # decisions: of the bound, of the confidences compared with and of the share shown
REACH = 12.0  # decisions; a longer one costs less quality and leaves less room for late corrections
LIMIT = 19.5  # decisions; twice that is a little less than the two points of a window
TOKENS_SMOOTHING = 0.005  # of the moving mean of an answer's tokens, by which costs are weighted
PRIOR = 200  # confidences that represent the calibration; each live one counts as one
ABOVE_ALL = math.nextafter(1.0, 2.0)  # a threshold that no confidence reaches


@dataclass(slots=True, eq=False)
class Step:
    """One decision as the balance counts it now."""

    spent: float | None  # None: not counted
    weight: float = 1.0
    recent: bool = True  # among the last SHARE_WINDOW


class ThresholdController:
    """Follows one wanted mean of `spent`, in [0, 1]."""

    def __init__(self, wanted: float, start: float, curve: Curve | None) -> None:
        """`start`: the rank that usually meets the target; `curve`: the calibration's, before live confidences."""
        self.wanted = wanted
        self.start = start
        self.balance = 0.0
        self._steps: deque[Step] = deque()
        self._spent = self._weight = 0.0  # sums over _steps
        self._tokens = 0.0  # a moving mean; 0: none counted yet
        self.expect(curve)

    def expect(self, curve: Curve | None) -> None:
        """Forgets the live confidences: those of another checkpoint are distributed differently."""
        prior = [step / 20 for step in range(20)] if curve is None else sample(curve, PRIOR)
        random.Random(0).shuffle(prior)  # the oldest leave first; shuffled, they leave evenly
        self._seen = deque(prior)
        self._sorted = sorted(prior)

    @property
    def rank(self) -> float:
        """The share of the confidences that should lie below the threshold."""
        off = min(1.0, max(-1.0, self.balance / REACH)) ** 3
        return self.start + off * (1.0 - self.start if off > 0 else self.start)

    @property
    def threshold(self) -> float:
        """The confidence of that rank; 0 where all stay, ABOVE_ALL where all go."""
        rank = self.rank
        if rank <= 0.0:
            return 0.0
        if rank >= 1.0:
            return ABOVE_ALL
        value = self._sorted[int(rank * len(self._sorted))]
        if self.balance > 0:  # equal confidences go together: they alternate around a balance of 0
            value = math.nextafter(value, math.inf)
        return min(ABOVE_ALL, max(0.0, value))

    def count(self, spent: float, confidence: float | None) -> Step:
        """Counts one decision.

        Args:
            confidence: the one compared with the threshold; None where the threshold had no influence.
        """
        if confidence is None:
            confidence = math.copysign(math.inf, 0.5 - spent)
        self._seen.append(confidence)
        insort(self._sorted, confidence)
        if len(self._seen) > SHARE_WINDOW:
            del self._sorted[bisect_left(self._sorted, self._seen.popleft())]
        step = Step(None)
        self._steps.append(step)
        self.correct(step, spent)
        if len(self._steps) > SHARE_WINDOW:
            old = self._steps.popleft()
            self._add(old, -1)
            old.recent = False
        return step

    def correct(self, step: Step, spent: float | None, weight: float = 1.0) -> None:
        """Updates a decision once it has ended: another pool answered, or none (None); its cost weighs `weight`."""
        change = self._off(spent, weight) - self._off(step.spent, step.weight)
        self.balance = min(LIMIT, max(-LIMIT, self.balance + change))
        self._add(step, -1)
        step.spent, step.weight = spent, weight
        self._add(step, 1)

    def weight(self, tokens: int) -> float:
        """The weight of an answer of so many tokens relative to the recent mean, which it updates."""
        self._tokens = self._tokens + TOKENS_SMOOTHING * (tokens - self._tokens) if self._tokens else float(tokens)
        return tokens / self._tokens

    @property
    def realised(self) -> float:
        """The mean of `spent` over the last SHARE_WINDOW decisions; NaN before the first."""
        return self._spent / self._weight if self._weight > 0 else math.nan

    def _off(self, spent: float | None, weight: float) -> float:
        return 0.0 if spent is None else weight * (self.wanted - spent)

    def _add(self, step: Step, sign: int) -> None:
        if step.spent is not None and step.recent:
            self._spent += sign * step.weight * step.spent
            self._weight += sign * step.weight


def sample(curve: Curve, count: int) -> list[float]:
    """`count` evenly ranked confidences of the distribution behind a calibration's curve, rising.

    The last pool's share at a threshold is the share of the confidences below it.
    """
    below = np.array([row[-1] for row in curve.shares])
    ranks = (np.arange(count) + 0.5) / count
    return [float(value) for value in np.interp(ranks, below, curve.thresholds)]
