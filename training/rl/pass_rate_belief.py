"""Beta beliefs about pass rates, from the estimator's predictions and each prompt's own past rollouts.

The mean of a prompt's Beta(a, b) starts at the prediction, calibrated on recent labels. Its strength (a + b, in
rollouts) is estimated from how accurate recent predictions were. The prompt's own rollouts are added, and fade as the
policy changes. The probability that G rollouts differ, so that GRPO can learn from them, follows in closed form.

Shapes: P prompts, N recent labels. G rollouts a group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Platt, enough_labels, fit_platt
from depo_gateway.estimator.logistic import sigmoid

WINDOW = 512  # recent labels, of the last few dozen steps: older ones are of an older policy
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # in rollouts


def nonzero_advantage(p_P: Array, group_size: int) -> Array:
    """1 - p^G - (1-p)^G (P,): the probability that G rollouts of pass rate p neither all pass nor all fail."""
    return np.asarray(1.0 - p_P**group_size - (1.0 - p_P) ** group_size)


def nonzero_advantage_of_beta(a_P: Array, b_P: Array, group_size: int) -> Array:
    """The mean (P,) of nonzero_advantage over pass rates drawn from Beta(a, b).

    E[p^G] is the product over i < G of (a + i) / (a + b + i); E[(1-p)^G] the same with b.
    """
    steps_G = np.arange(group_size)
    total_PG = (a_P + b_P)[:, None] + steps_G
    passed_P = np.prod((a_P[:, None] + steps_G) / total_PG, axis=1)
    failed_P = np.prod((b_P[:, None] + steps_G) / total_PG, axis=1)
    return np.asarray(1.0 - passed_P - failed_P)


def strength_of(predicted_N: Array, rates_N: Array, counts_N: Array, weights_N: Array) -> float:
    """The one of STRENGTHS that maximises the beta-binomial likelihood of the observed pass rates."""
    mean, passed, count = (torch.from_numpy(x) for x in (predicted_N.clip(0.005, 0.995), rates_N * counts_N, counts_N))
    weights = torch.from_numpy(weights_N)
    likelihoods = []
    for strength in STRENGTHS:
        a, b = strength * mean, strength * (1.0 - mean)
        seen = torch.lgamma(a + passed) + torch.lgamma(b + count - passed) - torch.lgamma(a + b + count)
        before = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        likelihoods.append(float((weights * (seen - before)).sum()))
    return STRENGTHS[int(np.argmax(likelihoods))]


class RecentLabel(NamedTuple):
    """A group's label with the estimator's score of its prompt at the time."""

    logit: float
    pass_rate: float
    rollouts: float
    weight: float


class PassRateBeliefs:
    """Recent labels and each prompt's own outcomes. `half_life` in generations; 0: own outcomes do not count."""

    def __init__(self, calibrate: bool, half_life: float) -> None:
        self.calibrate, self.half_life = calibrate, half_life
        self.recent: deque[RecentLabel] = deque(maxlen=WINDOW)
        self.platt, self.strength = Platt(), float("inf")
        self._own: dict[int, tuple[float, float, int]] = {}  # row -> passed, failed, step

    def predicted(self, logits_P: Array) -> Array:
        """The estimator's pass rate (P,), calibrated if there are enough labels."""
        return sigmoid(self.platt.slope * logits_P + self.platt.offset)

    def nonzero_advantage(self, rows: Sequence[int], logits_P: Array, group_size: int, step: int) -> Array:
        """The probability (P,) that a group of each prompt has a non-zero advantage."""
        p_P = self.predicted(logits_P).clip(1e-6, 1.0 - 1e-6)
        own = np.array([self._faded(row, step) for row in rows]).reshape(-1, 2)
        if np.isinf(self.strength) and not own.any():
            return nonzero_advantage(p_P, group_size)
        strength = min(self.strength, STRENGTHS[-1])
        return nonzero_advantage_of_beta(strength * p_P + own[:, 0], strength * (1.0 - p_P) + own[:, 1], group_size)

    def learn(self, row: int, logit: float, rate: float, count: int, weight: float, step: int) -> None:
        """Record a group: `count` rollouts of mean reward `rate` in [0, 1]. `logit`: the prediction, or NaN."""
        if self.half_life:
            passed, failed = self._faded(row, step)
            self._own[row] = (passed + rate * count, failed + (1.0 - rate) * count, step)
        if not np.isnan(logit):
            self.recent.append(RecentLabel(logit, rate, float(count), weight))

    def refit(self) -> None:
        """Calibrate on the recent labels, if that is switched on and they suffice."""
        if not self.calibrate or not self.recent:
            return
        logits, rates, counts, weights = np.array(self.recent).T
        if not enough_labels(rates, weights):  # all equal, for example: the accuracy of predictions is unknown
            self.platt, self.strength = Platt(), float("inf")
            return
        self.platt = fit_platt(logits, rates, weights)
        self.strength = strength_of(self.predicted(logits), rates, counts, weights)

    def state_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return {
            "recent": [list(label) for label in self.recent],
            "own": [[row, *own] for row, own in self._own.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent = deque((RecentLabel(*label) for label in state["recent"]), maxlen=WINDOW)
        self._own = {int(row): (passed, failed, int(step)) for row, passed, failed, step in state["own"]}
        self.platt, self.strength = Platt(), float("inf")
        self.refit()

    def _faded(self, row: int, step: int) -> tuple[float, float]:
        passed, failed, then = self._own.get(row, (0.0, 0.0, step))
        left = 0.5 ** ((step - then) / self.half_life) if self.half_life else 0.0
        return passed * left, failed * left
