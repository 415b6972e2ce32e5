"""The demo's figures: routed beside all small, all large, a coin and prompt length at the same share. Pure."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RESAMPLES = 2_000
HEADER = f"{'query':<22} {'confidence':>10}  {'pool':<6} {'reason':<10} answer"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one query gave, routed and pinned to each pool. `right` is None where nobody knows."""

    length: int  # of the prompt, in characters
    pool: str
    right: bool | None
    cost: float
    pinned_right: dict[str, bool | None]
    pinned_cost: dict[str, float]


def row_start(query: str, confidence: float | None, pool: str, reason: str) -> str:
    shown = query if len(query) <= 22 else query[:21] + "…"
    sure = "" if confidence is None else f"{confidence:.2f}"
    return f"{shown:<22} {sure:>10}  {pool:<6} {reason:<10} "


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table; accuracy only where every answer could be judged."""
    small, large = outcomes[0].pinned_cost
    share = sum(outcome.pool == large for outcome in outcomes) / len(outcomes)
    longest = longest_first(outcomes, round(share * len(outcomes)))
    full_cost = _mean([outcome.pinned_cost[large] for outcome in outcomes])

    def cost(pick: Callable[[int], float]) -> float:
        return _mean([pick(index) for index in range(len(outcomes))]) / full_cost if full_cost else 0.0

    def by_length(index: int) -> str:
        return large if index in longest else small

    rows = [
        (f"all {small}", 0.0, cost(lambda i: outcomes[i].pinned_cost[small])),
        (f"all {large}", 1.0, cost(lambda i: outcomes[i].pinned_cost[large])),
        ("random, same share", share, cost(lambda i: _mixed(outcomes[i].pinned_cost, small, large, share))),
        ("length, same share", share, cost(lambda i: outcomes[i].pinned_cost[by_length(i)])),
        ("routed", share, cost(lambda i: outcomes[i].cost)),
    ]
    lines = [f"{len(outcomes)} queries"]
    judged = all(outcome.right is not None for outcome in outcomes)
    if not judged:
        lines.append(f"{'':<20} {large + ' share':>12} {'cost':>8}")
        lines += [f"{name:<20} {part:>12.0%} {price:>8.0%}" for name, part, price in rows]
        return "\n".join(lines)
    scores = [
        [float(bool(outcome.pinned_right[small])) for outcome in outcomes],
        [float(bool(outcome.pinned_right[large])) for outcome in outcomes],
        [_mixed(_floats(outcome.pinned_right), small, large, share) for outcome in outcomes],
        [float(bool(outcome.pinned_right[by_length(index)])) for index, outcome in enumerate(outcomes)],
        [float(bool(outcome.right)) for outcome in outcomes],
    ]
    lines.append(f"{'':<20} {'accuracy':>9} {large + ' share':>12} {'cost':>8}")
    for (name, part, price), right in zip(rows, scores, strict=True):
        lines.append(f"{name:<20} {_mean(right):>9.1%} {part:>12.0%} {price:>8.0%}")
    for name, other in (("random", scores[2]), ("length", scores[3])):
        low, high = interval([mine - theirs for mine, theirs in zip(scores[4], other, strict=True)])
        lines.append(
            f"routed minus {name}: {_mean(scores[4]) - _mean(other):+.1%}, 95% interval {low:+.1%} to {high:+.1%}"
        )
    return "\n".join(lines)


def longest_first(outcomes: Sequence[Outcome], count: int) -> set[int]:
    """Indices of the `count` longest prompts; ties are broken by chance, with a fixed seed."""
    chance = random.Random(0)
    order = sorted(range(len(outcomes)), key=lambda index: (-outcomes[index].length, chance.random()))
    return set(order[:count])


def interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """A paired 95% bootstrap interval of the mean difference (percentiles of RESAMPLES resamples of queries)."""
    chance = random.Random(seed)
    means = sorted(_mean(chance.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def _mixed(values: dict[str, float], small: str, large: str, share: float) -> float:
    """The expectation of a coin that calls the large pool with probability `share`."""
    return (1 - share) * values[small] + share * values[large]


def _floats(values: dict[str, bool | None]) -> dict[str, float]:
    return {name: float(bool(value)) for name, value in values.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
