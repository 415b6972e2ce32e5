"""Scores and a threshold -> the pool that serves. Pure: random draws are arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway.config import PoolConfig, Rule


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
    """The pools that can take a request, cheapest first, and why the cheapest of all can't where it can't."""

    pools: tuple[str, ...]
    excluded: Reason | None = None  # CONTEXT or ACCEPTS


def eligible(pools: Mapping[str, PoolConfig], modalities: frozenset[str], context_needed: int) -> Eligible:
    """The pools that accept a request's modalities and whose context is long enough for it.

    A request too long for every context leaves the longest ones: `context_needed` is an estimate, the backends decide.
    An empty `pools` means that no pool accepts the modalities.
    """
    accepting = [name for name, pool in pools.items() if modalities <= set(pool.accepts)]
    if not accepting:
        return Eligible((), Reason.ACCEPTS)
    fitting = [name for name in accepting if (limit := pools[name].context_tokens) is None or context_needed <= limit]
    if not fitting:
        longest = max(pools[name].context_tokens or 0 for name in accepting)
        fitting = [name for name in accepting if pools[name].context_tokens == longest]
    first = next(iter(pools))
    excluded = None
    if first not in accepting:
        excluded = Reason.ACCEPTS
    elif first not in fitting:
        excluded = Reason.CONTEXT
    return Eligible(tuple(fitting), excluded)


def confidences(quality: Mapping[str, float], rule: Rule, candidates: Eligible) -> dict[str, float]:
    """How little is lost by serving from each eligible pool, in [0, 1]. Ineligible pools are not compared.

    `gain`: 1 - max(0, best predicted quality - the pool's own). `difficulty`: the pool's own predicted quality, the
    rule of DEPO (arXiv 2602.06375, section on routing).
    """
    quality = {name: quality[name] for name in candidates.pools if name in quality}
    if rule == "difficulty":
        return {name: min(1.0, max(0.0, value)) for name, value in quality.items()}
    best = max(quality.values(), default=0.0)
    return {name: 1.0 - min(1.0, max(0.0, best - value)) for name, value in quality.items()}


def by_threshold(
    confidence: Mapping[str, float],
    candidates: Eligible,
    threshold: float,
    estimator: str,
    explore: float = 0.0,
    draw: float = 1.0,
) -> Decision:
    """The cheapest eligible pool whose confidence is at least the threshold; the last one if none is.

    Args:
        confidence: by pool; a pool without one (a policy's checkpoint scores one pool) is below every threshold.
        explore: share routed uniformly over the eligible pools.
        draw: uniform in [0, 1); below `explore` it also picks the pool.
    """
    pools = candidates.pools
    greedy = next((name for name in pools if confidence.get(name, -1.0) >= threshold), pools[-1])
    shown = confidence.get(pools[0])
    chosen, reason = greedy, _reason(greedy, candidates)
    if draw < explore and len(pools) > 1:
        chosen, reason = pools[int(draw / explore * len(pools))], Reason.EXPLORE
    propensity = explore / len(pools) + (1.0 - explore) * (chosen == greedy) if len(pools) > 1 else 1.0
    return Decision(chosen, reason, shown, threshold, estimator, propensity)


def without_scores(
    candidates: Eligible, on_overload: str, shares: Mapping[str, float], threshold: float, draw: float
) -> Decision:
    """The pool when no stage gave scores: the one that `routing.on_overload` names, or a random one by usual share."""
    pools = candidates.pools
    if on_overload in pools:
        return Decision(on_overload, Reason.OVERLOAD, threshold=threshold)
    pool, propensity = _drawn(pools, shares, draw)
    return Decision(pool, Reason.OVERLOAD, threshold=threshold, propensity=propensity)


def by_share(
    confidence: Mapping[str, float],
    candidates: Eligible,
    shares: Mapping[str, float],
    threshold: float,
    estimator: str,
    draw: float,
    reason: Reason = Reason.EXPLORE,
    explore: float = 0.0,
) -> Decision:
    """A random pool at the shares given, whatever the scores say, because they can't be relied on.

    Args:
        shares: none of an eligible pool: all are equally likely.
        reason: EXPLORE where labels show the scores to be no better, UNFAMILIAR where the prompt is.
        explore: share routed uniformly over the eligible pools.
    """
    pool, propensity = _drawn(candidates.pools, shares, draw, explore)
    reason = reason if len(candidates.pools) > 1 else _reason(pool, candidates)
    return Decision(pool, reason, confidence.get(candidates.pools[0]), threshold, estimator, propensity)


def at_an_end(
    confidence: Mapping[str, float],
    candidates: Eligible,
    threshold: float,
    estimator: str,
    explore: float = 0.0,
    draw: float = 1.0,
) -> Decision:
    """The first eligible pool for threshold 0, the last for 1, whatever the scores say. See by_threshold."""
    unsure = by_threshold(dict.fromkeys(candidates.pools, 0.0), candidates, threshold, estimator, explore, draw)
    return replace(unsure, confidence=confidence.get(candidates.pools[0]))


def keep(decision: Decision, pool: str, order: Sequence[str], candidates: Eligible, in_tool_loop: bool) -> Decision:
    """Keeps a conversation in its pool unless this turn needs a better one; a tool loop never moves."""
    if pool not in candidates.pools:
        return decision
    higher = order.index(decision.pool) > order.index(pool)
    if higher and not decision.reason.random and not in_tool_loop:
        return decision
    return replace(decision, pool=pool, reason=Reason.STICKY, propensity=1.0)


def _reason(chosen: str, candidates: Eligible) -> Reason:
    if chosen != candidates.pools[0]:
        return Reason.UNSURE
    return candidates.excluded or Reason.CONFIDENT


def _drawn(pools: Sequence[str], shares: Mapping[str, float], draw: float, explore: float = 0.0) -> tuple[str, float]:
    """A pool in proportion to its share, uniformly with probability `explore`; and the probability of drawing it."""
    weights = [shares.get(name, 0.0) for name in pools]
    total = sum(weights)
    weights = [weight / total for weight in weights] if total > 0 else [1.0 / len(pools)] * len(pools)
    weights = [explore / len(pools) + (1.0 - explore) * weight for weight in weights]
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
