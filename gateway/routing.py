"""Scores and a threshold -> the pool that serves. Pure: chance comes in as an argument."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from depo_gateway.gateway.config import PoolConfig, Rule

Reason = Literal[
    "confident", "unsure", "pinned", "sticky", "explore", "context", "accepts", "overload", "fallback", "budget"
]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why. `propensity`: the probability with which this pool was chosen, in (0, 1]."""

    pool: str
    reason: Reason
    confidence: float | None = None  # of the cheapest eligible pool; None where nothing was scored
    threshold: float | None = None
    estimator: str = ""
    propensity: float = 1.0


@dataclass(frozen=True, slots=True)
class Eligible:
    """The pools that can take a request, cheapest first, and why the cheapest of all can't, if so."""

    pools: tuple[str, ...]
    excluded: Literal["context", "accepts"] | None = None


def eligible(pools: Mapping[str, PoolConfig], needs: frozenset[str], prompt_tokens: int) -> Eligible:
    """Pools that accept what the request carries and whose context holds it.

    A prompt too long for every context leaves the longest ones: the count is an estimate, backends have the last word.
    An empty `pools` means that nobody accepts what the request carries.
    """
    takers = [name for name, pool in pools.items() if needs <= set(pool.accepts)]
    if not takers:
        return Eligible((), "accepts")
    fitting = [name for name in takers if (limit := pools[name].context_tokens) is None or prompt_tokens <= limit]
    if not fitting:
        longest = max(pools[name].context_tokens or 0 for name in takers)
        fitting = [name for name in takers if pools[name].context_tokens == longest]
    first = next(iter(pools))
    excluded: Literal["context", "accepts"] | None = None
    if first not in takers:
        excluded = "accepts"
    elif first not in fitting:
        excluded = "context"
    return Eligible(tuple(fitting), excluded)


def confidences(quality: Mapping[str, float], rule: Rule, candidates: Eligible) -> dict[str, float]:
    """How little is lost by serving from each eligible pool, in [0, 1]; a pool that can't serve is no loss.

    `gain`: 1 - max(0, best predicted quality - the pool's own). `difficulty`: the pool's own predicted quality, the
    rule of DEPO (arXiv 2602.06375, section on routing).
    """
    quality = {name: quality[name] for name in candidates.pools if name in quality}
    if rule == "difficulty":
        return {name: min(1.0, max(0.0, value)) for name, value in quality.items()}
    best = max(quality.values(), default=0.0)
    return {name: 1.0 - min(1.0, max(0.0, best - value)) for name, value in quality.items()}


def decide(
    confidence: Mapping[str, float],
    candidates: Eligible,
    threshold: float,
    estimator: str,
    explore: float = 0.0,
    draw: float = 1.0,
) -> Decision:
    """The cheapest eligible pool whose confidence is at least the threshold; the last one if none is.

    Args:
        confidence: by pool; a pool without one (a policy's checkpoint scores one pool) is never sure.
        explore: share routed uniformly over the eligible pools.
        draw: uniform in [0, 1); below `explore` it also picks the pool.
    """
    pools = candidates.pools
    greedy = next((name for name in pools if confidence.get(name, -1.0) >= threshold), pools[-1])
    shown = confidence.get(pools[0])
    chosen, reason = greedy, _reason(greedy, candidates)
    if draw < explore and len(pools) > 1:
        chosen, reason = pools[int(draw / explore * len(pools))], "explore"
    propensity = explore / len(pools) + (1.0 - explore) * (chosen == greedy) if len(pools) > 1 else 1.0
    return Decision(chosen, reason, shown, threshold, estimator, propensity)


def without_scores(
    candidates: Eligible, on_overload: str, shares: Mapping[str, float], threshold: float, draw: float
) -> Decision:
    """What happens when not even the cheap stage answers: the pool named, or a coin at the usual shares."""
    pools = candidates.pools
    if on_overload in pools:
        return Decision(on_overload, "overload", threshold=threshold)
    pool, propensity = _toss(pools, shares, draw)
    return Decision(pool, "overload", threshold=threshold, propensity=propensity)


def by_share(
    confidence: Mapping[str, float],
    candidates: Eligible,
    shares: Mapping[str, float],
    threshold: float,
    estimator: str,
    draw: float,
) -> Decision:
    """By coin at the shares given, whatever the scores say: labels found them to be worth nothing."""
    pool, propensity = _toss(candidates.pools, shares, draw)
    reason: Reason = "explore" if len(candidates.pools) > 1 else _reason(pool, candidates)
    return Decision(pool, reason, confidence.get(candidates.pools[0]), threshold, estimator, propensity)


def keep(decision: Decision, pool: str, order: Sequence[str], candidates: Eligible, in_tool_loop: bool) -> Decision:
    """A conversation keeps its pool unless this turn must move up; inside a tool loop it does not move by itself."""
    if pool not in candidates.pools:
        return decision
    higher = order.index(decision.pool) > order.index(pool)
    if higher and decision.reason not in ("overload", "explore") and not in_tool_loop:  # a coin is no need to move
        return decision
    return replace(decision, pool=pool, reason="sticky", propensity=1.0)


def _reason(chosen: str, candidates: Eligible) -> Reason:
    if chosen != candidates.pools[0]:
        return "unsure"
    return candidates.excluded or "confident"


def _toss(pools: Sequence[str], shares: Mapping[str, float], draw: float) -> tuple[str, float]:
    """A pool in proportion to its share, and the probability with which it was drawn."""
    weights = [shares.get(name, 0.0) for name in pools]
    total = sum(weights)
    weights = [weight / total for weight in weights] if total > 0 else [1.0 / len(pools)] * len(pools)
    index = _pick(weights, draw)
    return pools[index], weights[index]


def _pick(weights: Sequence[float], draw: float) -> int:
    """Index whose cumulated weight first exceeds `draw`."""
    reached = 0.0
    for index, weight in enumerate(weights):
        reached += weight
        if draw < reached:
            return index
    return len(weights) - 1
