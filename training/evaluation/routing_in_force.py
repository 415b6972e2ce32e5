"""How the gateways route now, as the records say: models, rule, threshold or target, costs, and the live large share.

Each record names the settings that it was served with, except those that an earlier version wrote. Of these the rule
follows from scores and confidences, and the threshold is on each; models and costs are unknown.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depo_gateway.estimator.records.reasons import Reason, reason_named
from depo_gateway.estimator.records.types import Record, RoutingSettings

NEWEST_ROUTED = 100  # routed requests by which the settings in force are known
UNKNOWN_MODEL = ""


@dataclass(frozen=True, slots=True)
class RoutingInForce:
    """How the newest routed requests were decided.

    Under a target of share or cost the gateway moves the threshold all the time: `threshold` is then the newest
    requests' median.
    """

    rule: str
    threshold: float
    target: tuple[str, float] | None  # ("large_share" | "quality" | "cost", bound); None: the threshold is fixed
    costs: Mapping[str, float] | None  # of each pool, per token in any unit, cheapest pool first; None: unknown
    requests: int  # newest routed requests that this is known from
    agreeing: int  # of these, with the same settings
    source: str  # where this is known from, for messages

    def describe(self) -> str:
        """ "the rule gain at threshold 0.85", or "the rule gain with routing.target large_share 0.3"."""
        if self.target is None:
            return f"the rule {self.rule} at threshold {self.threshold:.4g}"
        name, bound = self.target
        return f"the rule {self.rule} with routing.target {name} {bound:.4g} (threshold now {self.threshold:.4g})"


@dataclass(frozen=True, slots=True)
class ThresholdPeriod:
    """A run of routed requests under the same rule and the same threshold or target."""

    since: float  # Unix seconds
    until: float
    requests: int
    rule: str
    threshold: float  # the median
    target: tuple[str, float] | None


def is_routed(record: Record) -> bool:
    """Whether a threshold, or what chose in its place, decided this request: not pinned, kept or fallen back."""
    reason = reason_named(record.reason)
    return reason is not None and (reason.in_shares or reason.free) and record.threshold is not None


def served_models(records: Sequence[Record], pools: Sequence[str]) -> dict[str, dict[str, int]]:
    """The models that answered each of `pools`, and how many requests each answered, the most frequent first.

    UNKNOWN_MODEL counts requests whose record does not name the model: an earlier version wrote it. Answers to shadow
    calls are not counted; learner.yaml names their models.
    """
    counts: dict[str, Counter[str]] = {pool: Counter() for pool in pools}
    for record in records:
        if record.pool in counts and record.status == 200:
            served = None if record.settings is None else record.settings.pools.get(record.pool)
            counts[record.pool][UNKNOWN_MODEL if served is None else served.model] += 1
    return {pool: dict(count.most_common()) for pool, count in counts.items()}


def routing_in_force(records: Sequence[Record]) -> RoutingInForce | None:
    """The rule and the threshold or target of the newest routed requests; None where no request was routed.

    Args:
        records: oldest first.
    """
    newest = [record for record in records if is_routed(record)][-NEWEST_ROUTED:]
    if not newest:
        return None
    named = [record for record in newest if record.settings is not None]
    if not named:
        return _inferred(newest)
    settings = Counter(_key(record.settings) for record in named).most_common(1)[0][0]
    same = [record for record in named if _key(record.settings) == settings]
    found = same[-1].settings
    assert found is not None
    target = next(iter(found.target.items()), None)
    threshold = found.threshold if found.threshold is not None else _median(same)
    costs = {name: pool.cost for name, pool in found.pools.items()}
    source = f"the gateway's settings on {len(same)} of the newest {len(newest)} routed records"
    return RoutingInForce(found.rule, threshold, target, costs, len(newest), len(same), source)


def threshold_periods(records: Sequence[Record]) -> list[ThresholdPeriod]:
    """How the rule and the threshold or target changed over time: consecutive routed requests, oldest first.

    Under several gateways with different settings the periods alternate.
    """
    runs: list[tuple[tuple[str, tuple[str, float] | float | None], list[Record]]] = []
    for record in records:
        if is_routed(record):
            kind = _kind(record)
            if not runs or runs[-1][0] != kind:
                runs.append((kind, []))
            runs[-1][1].append(record)
    return [
        ThresholdPeriod(
            run[0].time, run[-1].time, len(run), rule, _median(run), bound if isinstance(bound, tuple) else None
        )
        for (rule, bound), run in runs
    ]


def live_large_share(records: Sequence[Record], last: str) -> float | None:
    """The share of the pool `last` among the requests that the threshold decided; None without any.

    Explored requests are left out: they were drawn at random, and the others stand for the same traffic. For those with
    an unfamiliar prompt no others stand.
    """
    decided = [record for record in records if is_routed(record) and record.reason != Reason.EXPLORE]
    return sum(record.pool == last for record in decided) / len(decided) if decided else None


def _inferred(newest: Sequence[Record]) -> RoutingInForce:
    """From records that name no settings."""
    rule = Counter(rule_of_record(record) for record in newest).most_common(1)[0][0]
    threshold, count = Counter(record.threshold for record in newest).most_common(1)[0]
    assert threshold is not None
    if 2 * count > len(newest):
        source = f"the threshold on {count} of the newest {len(newest)} routed records"
        return RoutingInForce(rule, threshold, None, None, len(newest), count, source)
    last = Counter(record.pools[-1] for record in newest if record.pools).most_common(1)
    share = live_large_share(newest, last[0][0]) if last else None
    source = (
        f"the thresholds on the newest {len(newest)} routed records, which vary, so the gateway follows a target; it is"
        " taken to be their large share"
    )
    target = ("large_share", 0.0 if share is None else share)
    return RoutingInForce(rule, _median(newest), target, None, len(newest), len(newest), source)


def rule_of_record(record: Record) -> str:
    """The rule by which a scored record's confidence follows from its qualities; gain where both do."""
    quality = [record.quality[pool] for pool in record.pools if pool in record.quality]
    if not quality or record.confidence is None:
        return "gain"
    by_rule = {"gain": 1.0 - max(0.0, max(quality) - quality[0]), "difficulty": quality[0]}
    return min(by_rule, key=lambda rule: abs(by_rule[rule] - (record.confidence or 0.0)))


def _kind(record: Record) -> tuple[str, tuple[str, float] | float | None]:
    """The rule, and the target or the threshold."""
    settings = record.settings
    if settings is None:
        return rule_of_record(record), record.threshold
    return settings.rule, next(iter(settings.target.items()), settings.threshold)


def _key(settings: RoutingSettings | None) -> tuple[object, ...]:
    assert settings is not None
    pools = tuple((name, pool.model, pool.cost) for name, pool in settings.pools.items())
    return settings.rule, settings.threshold, tuple(settings.target.items()), pools


def _median(records: Sequence[Record]) -> float:
    return statistics.median(record.threshold for record in records if record.threshold is not None)
