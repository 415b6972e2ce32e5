"""The rollouts of one prompt, and the labels that the estimator learns from them. Pure functions.

Shapes: G rollouts a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE_MARGIN = 1e-4  # token confidence is clipped this far from 0 and 1
ADVANTAGE_TOLERANCE = 1e-6  # rewards that differ by less count as equal: their advantage is 0


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt's rollouts. `rewards`: G, NaN where there is none; `log_probs`: G mean token log-probabilities."""

    row: int  # of the data set
    rewards: tuple[float, ...]
    log_probs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupLabel:
    """What one group teaches: rewards on a scale from 0 to 1, and the weight of the group in the estimator's loss."""

    row: int  # of the data set
    quality: float  # mean reward
    spread: float  # 0: zero advantage
    token_confidence: float | None
    weight: float
    count: int = 0  # rollouts that have a reward


@dataclass(frozen=True, slots=True)
class GroupPrediction:
    """A group's predicted and actual mean reward, its predicted worth and its actual spread."""

    predicted: float
    quality: float
    worth: float
    spread: float


def quality_of(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> float | None:
    """The paper's t: mean reward (mean@G) of the rollouts that have one, scaled from [low, high] to [0, 1]; or None."""
    present = _finite(rewards)
    if not present:
        return None
    mean = (math.fsum(present) / len(present) - low) / (high - low)
    return min(max(mean, 0.0), 1.0)


def has_advantage(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards differ; NaN counts as no reward."""
    present = _finite(rewards)
    return bool(present) and max(present) - min(present) > ADVANTAGE_TOLERANCE


def spread_of(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> float:
    """Twice the standard deviation of the rewards, scaled from [low, high] to [0, 1]; 0: zero advantage.

    The maximum, 1, has half the rewards at each end.
    """
    present = _finite(rewards)
    if not has_advantage(present):
        return 0.0
    mean = math.fsum(present) / len(present)
    deviation = math.sqrt(math.fsum((reward - mean) ** 2 for reward in present) / len(present))
    return min(2.0 * deviation / (high - low), 1.0)


def is_binary(rewards: Sequence[float], low: float = 0.0, high: float = 1.0) -> bool:
    """Whether every reward is one of the two ends."""
    return all(min(abs(reward - low), abs(reward - high)) <= ADVANTAGE_TOLERANCE for reward in _finite(rewards))


def token_confidence_of(log_probs: Sequence[float]) -> float | None:
    """The paper's d: exp of the mean over rollouts of their mean token log-probability, in [1e-4, 1 - 1e-4]."""
    present = _finite(log_probs)
    if not present:
        return None
    return min(max(math.exp(min(math.fsum(present) / len(present), 0.0)), CONFIDENCE_MARGIN), 1.0 - CONFIDENCE_MARGIN)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
