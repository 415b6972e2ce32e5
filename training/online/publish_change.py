"""The change that a publish makes to the large share and the cost, at the threshold or target in force. Pure.

It is measured on the newest prompts that a threshold decided, labelled or not; each counts once, whatever the random
draws of exploration made of it. The served checkpoint and the candidate both score them.

Prompts that were unfamiliar to the served checkpoint count before the change as they were served: its scores did not
decide them. The candidate is taken to know them.

A fixed threshold is used as it is. For a target of quality each checkpoint's own calibration gives the threshold. A
target of share or cost is compared as the gateway's controller holds it: each checkpoint at the threshold that meets
the target on these prompts; where equal confidences lie at that threshold the controller alternates between both sides
of them, and share and cost are a mixture.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.records.types import Example, Record
from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.training.evaluation.logged_traffic import record_tokens
from depo_gateway.training.evaluation.routing_in_force import RoutingInForce, is_routed, routing_in_force

LIVE_RECORDS = 4000  # the newest that are read
LIVE_PROMPTS = 1000  # the newest that are scored: the standard error of a share is at most 1.6 points
CANDIDATE_THRESHOLDS = 201  # tried to meet a target


class UnknownChangeError(Exception):
    """The records do not say what a publish would change. The message is the reason."""


@dataclass(frozen=True, slots=True)
class LiveTraffic:
    """The newest N routed prompts, and how they are routed."""

    in_force: RoutingInForce
    pools: tuple[str, ...]  # (K,)
    prompts: tuple[Record, ...]  # (N,) oldest first, each with its text
    eligible: NDArray[np.bool_]  # (N, K) which pools could take it
    tokens: Array  # (N,) of prompt and answer; the mean where there is no count
    served: NDArray[np.int64]  # (N,) the pool that served
    unfamiliar: NDArray[np.bool_]  # (N,) whether the checkpoint that served did not know the prompt
    costs: Array | None  # (K,) per token; None: unknown

    def examples(self, text: TextConfig) -> list[Example]:
        """The prompts, without labels, as a checkpoint reads them."""
        texts = [extract_text(text, record.asked or "") for record in self.prompts]
        return [
            Example(prompt, {}, context=context, task=record.group)
            for (prompt, context), record in zip(texts, self.prompts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class RouterOutcome:
    """The routing of N prompts by one checkpoint."""

    threshold: float
    large_share: float
    cost: float | None  # relative to serving all by the last pool; None: the costs are unknown


@dataclass(frozen=True, slots=True)
class PublishChange:
    """What a publish changes for live traffic."""

    before: RouterOutcome
    after: RouterOutcome
    rule: str
    target: str | None  # "large_share=0.3"; None: a fixed threshold
    prompts: int
    source: str  # where rule, threshold or target, and costs are known from

    @property
    def share_change(self) -> float:
        return self.after.large_share - self.before.large_share

    @property
    def cost_change(self) -> float | None:
        """Relative to all-large's cost; None where the costs are unknown."""
        if self.before.cost is None or self.after.cost is None:
            return None
        return self.after.cost - self.before.cost

    @property
    def cost_increase(self) -> float:
        """What the gate compares: the rise in cost or, where costs are unknown, its upper bound, the rise in share."""
        return self.share_change if self.cost_change is None else self.cost_change

    def plain(self) -> dict[str, Any]:
        """For manifests and state files."""
        return {**asdict(self), "share_change": self.share_change, "cost_change": self.cost_change}

    def describe(self) -> str:
        """The numbers, one clause."""
        before, after = self.before, self.after
        if self.target is not None:
            at = f"with routing.target {self.target} (threshold {before.threshold:.3f}, then {after.threshold:.3f})"
        else:
            at = f"at threshold {before.threshold:.4g}"
        if before.cost is None or after.cost is None:
            cost = "; the pools' costs are unknown"
        else:
            cost = f" and the cost from {before.cost:.1%} to {after.cost:.1%} of all-large's"
        return (
            f"{at} (rule {self.rule}) the large share goes from {before.large_share:.1%} to {after.large_share:.1%}"
            f"{cost}, on {self.prompts} live prompts"
        )


def live_traffic(
    records: Sequence[Record], pools: tuple[str, ...], costs: Mapping[str, float] | None = None
) -> LiveTraffic:
    """The newest routed prompts of records, oldest first.

    Args:
        costs: by pool, used where the records do not name them.

    Raises:
        UnknownChangeError: the threshold in force is unknown, or no routed record has a text.
    """
    in_force = routing_in_force(records)
    if in_force is None:
        raise UnknownChangeError("no recent record was routed by a threshold, so the one in force is unknown")
    prompts = tuple(record for record in records if _usable(record, pools))[-LIVE_PROMPTS:]
    if not prompts:
        raise UnknownChangeError("no recent routed record has its text and these pools")
    given = in_force.costs or costs or {}
    by_pool = np.array([given.get(pool, np.nan) for pool in pools], float)
    return LiveTraffic(
        in_force,
        pools,
        prompts,
        np.array([[pool in record.pools for pool in pools] for record in prompts]),
        record_tokens(prompts),
        np.array([pools.index(record.pool) for record in prompts]),
        np.array([record.reason == Reason.UNFAMILIAR for record in prompts]),
        by_pool if by_pool[-1] > 0 and not np.isnan(by_pool).any() else None,
    )


def _usable(record: Record, pools: tuple[str, ...]) -> bool:
    """Whether it was routed by a threshold, among these pools, and has its text."""
    return is_routed(record) and record.asked is not None and record.pool in pools and record.pool in record.pools


def measure_change(
    traffic: LiveTraffic, before: tuple[Array, Calibration] | None, after: tuple[Array, Calibration]
) -> PublishChange:
    """The change from one checkpoint to another.

    Args:
        before, after: qualities (N, K) and calibration. Without a checkpoint before, what served the prompts counts.

    Raises:
        UnknownChangeError: a calibration has no threshold for the target of quality.
    """
    in_force = traffic.in_force
    first = _as_served(traffic) if before is None else _routed(traffic, *before, known=~traffic.unfamiliar)
    target = None if in_force.target is None else f"{in_force.target[0]}={in_force.target[1]:g}"
    known = np.ones(len(traffic.prompts), np.bool_)
    return PublishChange(
        first, _routed(traffic, *after, known), in_force.rule, target, len(traffic.prompts), in_force.source
    )


def _routed(traffic: LiveTraffic, quality: Array, calibration: Calibration, known: NDArray[np.bool_]) -> RouterOutcome:
    """`known` (N,): the others stay where they were served."""
    in_force = traffic.in_force
    confidence = eligible_confidence(quality, traffic.eligible, in_force.rule)
    if in_force.target is None:
        return _at(traffic, confidence, in_force.threshold, known)
    name, bound = in_force.target
    if name != "quality":
        return _controlled(traffic, confidence, name, bound, known)
    try:
        return _at(traffic, confidence, calibration.threshold(in_force.rule, quality=bound), known)
    except ValueError as error:
        raise UnknownChangeError(f"routing.target {name} {bound:g} has no threshold: {error}") from None


def _at(traffic: LiveTraffic, confidence: Array, threshold: float, known: NDArray[np.bool_]) -> RouterOutcome:
    routed = route_eligible(confidence, traffic.eligible, threshold)
    return _outcome(traffic, threshold, np.where(known, routed, traffic.served))


def _as_served(traffic: LiveTraffic) -> RouterOutcome:
    """What served the prompts, explored ones left out: their pool was drawn at random."""
    decided = np.array([record.reason != Reason.EXPLORE for record in traffic.prompts])
    rows = np.flatnonzero(decided) if decided.any() else np.arange(len(decided))
    seen = replace(traffic, tokens=traffic.tokens[rows])
    return _outcome(seen, traffic.in_force.threshold, traffic.served[rows])


def _outcome(traffic: LiveTraffic, threshold: float, pool: NDArray[np.int64]) -> RouterOutcome:
    share = float((pool == len(traffic.pools) - 1).mean())
    return RouterOutcome(float(threshold), share, None if traffic.costs is None else _cost(traffic, pool))


def _cost(traffic: LiveTraffic, pool: NDArray[np.int64]) -> float:
    """Relative to the last pool's for all; the answers are taken to be equally long in each pool."""
    assert traffic.costs is not None
    return float(traffic.tokens @ traffic.costs[pool] / (traffic.tokens.sum() * traffic.costs[-1]))


def _controlled(
    traffic: LiveTraffic, confidence: Array, name: str, bound: float, known: NDArray[np.bool_]
) -> RouterOutcome:
    """The outcome where a controller holds a share or cost at its target: between the two thresholds around it."""
    decisive = np.where(traffic.eligible[:, :-1], confidence[:, :-1], -1.0).max(1)
    levels = np.unique([0.0, *np.quantile(decisive, np.linspace(0, 1, CANDIDATE_THRESHOLDS)), np.nextafter(1.0, 2.0)])
    outcomes = [_at(traffic, confidence, level, known) for level in levels]
    spent = np.array([o.large_share if name == "large_share" or o.cost is None else o.cost for o in outcomes])
    reaching = np.flatnonzero(spent >= bound)
    if not len(reaching) or not reaching[0]:
        return outcomes[-1] if not len(reaching) else outcomes[0]  # no threshold spends so much, or so little
    below, over = outcomes[reaching[0] - 1], outcomes[reaching[0]]
    part = float((bound - spent[reaching[0] - 1]) / (spent[reaching[0]] - spent[reaching[0] - 1]))
    cost = None if below.cost is None or over.cost is None else below.cost + part * (over.cost - below.cost)
    share = below.large_share + part * (over.large_share - below.large_share)
    return RouterOutcome((over if part >= 0.5 else below).threshold, share, cost)


def eligible_confidence(quality_NK: Array, eligible_NK: NDArray[np.bool_], rule: str) -> Array:
    """Each pool's confidence (N, K), as the gateway computes it: pools that can't take the request are not compared."""
    if rule == "difficulty":
        return quality_NK
    best = np.where(eligible_NK, quality_NK, -np.inf).max(1, keepdims=True)
    confidence: Array = 1.0 - np.maximum(0.0, best - quality_NK)
    return confidence


def route_eligible(confidence_NK: Array, eligible_NK: NDArray[np.bool_], threshold: float) -> NDArray[np.int64]:
    """The pool of each prompt (N,): the cheapest eligible one whose confidence reaches the threshold, else the last."""
    sure = eligible_NK & (confidence_NK >= threshold)
    last = eligible_NK.shape[1] - 1 - eligible_NK[:, ::-1].argmax(1)
    chosen: NDArray[np.int64] = np.where(sure.any(1), sure.argmax(1), last)
    return chosen
