"""The demo's figures: routing against all small, all large, random and prompt length at the same share. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 2_000
HEADER = f"{'query':<22} {'confidence':>10}  {'pool':<6} {'reason':<10} answer"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Each pool's answer to one query, cheapest first, and the pool chosen. `right` is None without a known answer."""

    length: int  # of the prompt, in characters
    pool: str
    right: dict[str, bool | None]
    cost: dict[str, float]


def row_start(query: str, confidence: float | None, pool: str, reason: str) -> str:
    shown = query if len(query) <= 22 else query[:21] + "…"
    sure = "" if confidence is None else f"{confidence:.2f}"
    return f"{shown:<22} {sure:>10}  {pool:<6} {reason:<10} "


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table; with accuracies if every query has a known answer."""
    small, large = outcomes[0].cost
    share = sum(outcome.pool == large for outcome in outcomes) / len(outcomes)
    longest = longest_first(outcomes, round(share * len(outcomes)))
    full_cost = _mean([outcome.cost[large] for outcome in outcomes])
    policies: list[tuple[str, float, list[float]]] = [  # name, share, and each query's weight on the large pool
        (f"all {small}", 0.0, [0.0] * len(outcomes)),
        (f"all {large}", 1.0, [1.0] * len(outcomes)),
        ("random, same share", share, [share] * len(outcomes)),
        ("length, same share", share, [float(index in longest) for index in range(len(outcomes))]),
        ("routed", share, [float(outcome.pool == large) for outcome in outcomes]),
    ]

    def expected(values: Sequence[dict[str, float]], weights: list[float]) -> list[float]:
        return [(1 - w) * value[small] + w * value[large] for value, w in zip(values, weights, strict=True)]

    judged = all(None not in outcome.right.values() for outcome in outcomes)
    costs = [outcome.cost for outcome in outcomes]
    rights = [{name: float(bool(value)) for name, value in outcome.right.items()} for outcome in outcomes]
    lines = [f"{len(outcomes)} queries", f"{'':<20}{' accuracy' * judged:>10} {large + ' share':>12} {'cost':>8}"]
    for name, part, weights in policies:
        accuracy = f"{_mean(expected(rights, weights)):.1%}" if judged else ""
        price = _mean(expected(costs, weights)) / full_cost if full_cost else 0.0
        lines.append(f"{name:<20}{accuracy:>10} {part:>12.0%} {price:>8.0%}")
    if judged:
        routed = expected(rights, policies[-1][2])
        for name, weights in (("random", policies[2][2]), ("length", policies[3][2])):
            differences = [mine - other for mine, other in zip(routed, expected(rights, weights), strict=True)]
            low, high = interval(differences)
            lines.append(f"routed minus {name}: {_mean(differences):+.1%}, 95% interval {low:+.1%} to {high:+.1%}")
    return "\n".join(lines)


def longest_first(outcomes: Sequence[Outcome], count: int) -> set[int]:
    """Indices of the `count` longest prompts; ties are broken at random, with a fixed seed."""
    chance = random.Random(0)
    order = sorted(range(len(outcomes)), key=lambda index: (-outcomes[index].length, chance.random()))
    return set(order[:count])


def interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """A paired 95% bootstrap interval of the mean difference (percentiles of RESAMPLES resamples of queries)."""
    chance = random.Random(seed)
    means = sorted(_mean(chance.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
