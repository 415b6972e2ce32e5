"""One prompt's rollouts, and the labels the estimator learns from them. Pure functions.

Shapes: G rollouts a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CERTAIN = 1e-4  # token confidence is kept this far from 0 and 1
SAME = 1e-6  # rewards closer than this are alike: their advantage is 0


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt's rollouts. `rewards`: G, NaN where there is none; `log_probs`: G mean token log-probabilities."""

    index: int  # row of the data set
    rewards: tuple[float, ...]
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Label:
    """What one group taught, kept for replay."""

    index: int
    quality: float
    spread: float
    token_confidence: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A group's mean reward as predicted and as it was, its worth as predicted, and its spread as it was."""

    predicted: float
    quality: float
    worth: float
    spread: float


def quality_of(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> float | None:
    """The paper's t: mean reward (mean@G) of the rollouts that have one, from [low, high] to [0, 1]. None: none has."""
    there = _there(rewards)
    if not there:
        return None
    mean = (math.fsum(there) / len(there) - low) / (high - low)
    return min(max(mean, 0.0), 1.0)


def spread_of(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> float:
    """Twice the standard deviation of the rewards there are, from [low, high] to [0, 1]; 0: zero advantage.

    1 is the most there can be: half the rewards at each end.
    """
    there = _there(rewards)
    if not there or max(there) - min(there) <= SAME:
        return 0.0
    mean = math.fsum(there) / len(there)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in there) / len(there))
    return min(2.0 * deviation / (high - low), 1.0)


def is_binary(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> bool:
    """Whether every reward there is stands at one of the two ends."""
    return all(min(abs(reward - low), abs(reward - high)) <= SAME for reward in _there(rewards))


def token_confidence_of(log_probs: Sequence[float]) -> float | None:
    """The paper's d: exp of the mean over rollouts of their mean token log-probability, in [1e-4, 1 - 1e-4]."""
    there = _there(log_probs)
    if not there:
        return None
    return min(max(math.exp(min(math.fsum(there) / len(there), 0.0)), CERTAIN), 1.0 - CERTAIN)


def _there(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
