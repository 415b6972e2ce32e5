"""Served traffic -> Examples: which labels of the records are used, and how much each counts. Pure.

Where several sources labelled one record, label_precedence.py says which label of each pool counts.

Weights. If only the served pool has a label, and scores or random routing chose it, the label represents all prompts
that could have been served there: it weighs 1 / propensity, clipped. Labels of every pool (shadowing) and labels on
decisions that were not free (sticky, fallback, budget, pinned) weigh 1. Records of the same prompt share one weight,
and their labels are averaged by it. Client claims (feedback, and verdicts by a reference that the client gave) are
capped: no key makes up more than a share of their weight.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.records.types import Example, Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.training.judging.label_sources import is_client_claim
from depo_gateway.training.outcomes.label_precedence import preferred_labels
from depo_gateway.training.outcomes.near_duplicates import near_duplicate_clusters
from depo_gateway.training.outcomes.table import question_key
from depo_gateway.training.outcomes.traffic_config import TrafficConfig

LABEL_STEP = 0.1  # labels of a burst differ by no more than about this
COMMON_OPENING = 0.1  # of all prompts: an opening that more of them share is a greeting or template, not a conversation


@dataclass(frozen=True, slots=True)
class Claim:
    """A key's own statement on one pool's answer, and the example that it went into."""

    example: int
    key: str
    pool: int
    quality: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Examples of distinct prompts, in order of time, with what else is known of each."""

    pools: tuple[str, ...]  # (K,)
    examples: tuple[Example, ...]
    times: NDArray[np.float64]  # (N,) Unix seconds of the newest record of each prompt
    keys: tuple[str, ...]  # (N,) the key of that record
    records: tuple[int, ...]  # (N,) its seq
    served: NDArray[np.int64]  # (N,) the pool that served it; -1: none of these pools
    inverse: NDArray[np.float64]  # (N,) the part of the weight that is 1 / propensity; 1: not weighted so
    oldest_label: NDArray[np.int64]  # (N,) the lowest seq of its labels
    group: NDArray[np.int64]  # (N,) its number, of what is held out together: near-duplicates, turns of a conversation
    conversation: NDArray[np.int64]  # (N,) its number; turns of one conversation have the same
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]  # what was left out or down-weighted, and why
    trained_to: int  # the highest seq of any label


@dataclass(frozen=True, slots=True)
class _UsableRecord:
    """A record with its text, and those of its labels that may be used."""

    record: Record
    labels: tuple[Label, ...]  # of these pools
    prompt: str
    context: str


@dataclass(frozen=True, slots=True)
class _LabelledPrompt:
    """A record with one label a pool."""

    source: _UsableRecord
    quality: Mapping[str, float]
    token_confidence: Mapping[str, float]
    claimed: tuple[str, ...]  # pools whose label is the client's claim
    inverse: float

    @property
    def key(self) -> str:
        return self.source.record.key


def examples_of_traffic(
    labelled: Sequence[Labelled],
    pools: tuple[str, ...],
    text: TextConfig,
    config: TrafficConfig,
    untrusted: Collection[str] = (),
) -> Traffic:
    """Examples, oldest first, from the records with a text, status 200 and a quality label of one of `pools`.

    Args:
        untrusted: keys whose claims are left out; a judge's labels on their requests still count.
    """
    usable = _usable(labelled, pools, text, untrusted)
    usable, notes = _without_bursts(usable, config)
    same: dict[tuple[str, str], list[_LabelledPrompt]] = defaultdict(list)
    for item in usable:
        same[question_key(item.prompt), item.context].append(_one_label_a_pool(item, pools, config.clip))
    prompts = sorted((_unweighted_if_complete(p, pools) for p in same.values()), key=lambda p: p[-1].source.record.time)
    factors = _claim_factors(prompts, config.key_share)
    notes += [
        f"labels claimed by key {key!r} are down-weighted to {factor:.2f}: they made up too much of all feedback"
        for key, factor in sorted(factors.items())
        if factor < 1
    ]
    newest = [records[-1].source.record for records in prompts]
    conversations = _conversations(prompts)
    return Traffic(
        pools=pools,
        examples=tuple(_example(records, pools, factors) for records in prompts),
        times=np.array([record.time for record in newest], float),
        keys=tuple(record.key for record in newest),
        records=tuple(record.seq for record in newest),
        served=np.array([pools.index(r.pool) if r.pool in pools else -1 for r in newest], np.int64),
        inverse=np.array([np.mean([one.inverse for one in records]) for records in prompts], float),
        oldest_label=np.array([min(x.seq for r in records for x in r.source.labels) for records in prompts], np.int64),
        group=_groups(prompts, conversations, config.near),
        conversation=np.array([numbers[0] for numbers in conversations], np.int64),
        claims=tuple(
            Claim(number, one.key, pools.index(pool), one.quality[pool])
            for number, records in enumerate(prompts)
            for one in records
            for pool in one.claimed
        ),
        notes=tuple(notes),
        trained_to=max((label.seq for item in labelled for label in item.labels), default=0),
    )


def claim_caps(traffic: Traffic, importance: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Factors (N,) on top of the importance weights (N,), which keep each key's claims within `share` of all claims.

    Without them a key that alone brings a new topic would gain weight as the others' examples are down-weighted.
    """
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    times = Counter(claim.example for claim in traffic.claims)
    for claim in traffic.claims:
        weight = traffic.examples[claim.example].weight / times[claim.example]
        before[claim.key] += weight
        after[claim.key] += weight * float(importance[claim.example])
    whole, left = sum(before.values()), sum(after.values())
    least = max(share, 1 / max(1, len(after)))
    factors = {
        key: min(1.0, max(least, before[key] / whole) * left / own) if own > 0 else 1.0 for key, own in after.items()
    }
    caps = np.ones(len(importance))
    for claim in traffic.claims:
        caps[claim.example] -= (1.0 - factors[claim.key]) / times[claim.example]
    return caps


def _usable(
    labelled: Sequence[Labelled], pools: tuple[str, ...], text: TextConfig, untrusted: Collection[str]
) -> list[_UsableRecord]:
    usable = []
    for item in sorted(labelled, key=lambda item: (item.record.time, item.record.seq)):
        record = item.record
        if record.asked is None or record.status != 200:
            continue
        labels = tuple(
            label
            for label in item.labels
            if label.pool in pools and not (record.key in untrusted and is_client_claim(record, label.source))
        )
        if not any(label.quality is not None for label in labels):
            continue
        prompt, context = extract_text(text, record.asked)
        if prompt.strip():
            usable.append(_UsableRecord(record, labels, prompt, context))
    return usable


def _without_bursts(usable: list[_UsableRecord], config: TrafficConfig) -> tuple[list[_UsableRecord], list[str]]:
    """Leaves out the claims of a key that gave near-duplicate prompts like labels `burst` times in `burst_seconds`."""
    cluster = near_duplicate_clusters([item.prompt for item in usable], config.near)
    series: dict[tuple[str, int, str, int], list[int]] = defaultdict(list)
    for number, item in enumerate(usable):
        for label in item.labels:
            if label.quality is not None and is_client_claim(item.record, label.source):
                level = round(label.quality / LABEL_STEP)
                series[item.record.key, int(cluster[number]), label.pool, level].append(number)
    bursts: dict[str, set[int]] = defaultdict(set)
    for (key, *_), numbers in series.items():
        times = np.array([usable[number].record.time for number in numbers])  # rising
        for start in range(len(numbers) - config.burst + 1):
            if times[start + config.burst - 1] - times[start] <= config.burst_seconds:
                bursts[key].update(numbers[start : start + config.burst])
    left_out = {number for numbers in bursts.values() for number in numbers}
    remaining = []
    for number, item in enumerate(usable):
        labels = item.labels
        if number in left_out:
            labels = tuple(label for label in labels if not is_client_claim(item.record, label.source))
        if any(label.quality is not None for label in labels):
            remaining.append(replace(item, labels=labels))
    notes = [
        f"{len(numbers)} records of key {key!r} are a burst of near-duplicate prompts with like labels: its labels"
        " there are left out"
        for key, numbers in sorted(bursts.items())
    ]
    return remaining, notes


def _one_label_a_pool(item: _UsableRecord, pools: tuple[str, ...], clip: float) -> _LabelledPrompt:
    record = item.record
    tokens: dict[str, list[float]] = defaultdict(list)
    for label in item.labels:
        if label.token_confidence is not None:
            tokens[label.pool].append(label.token_confidence)
    preferred = preferred_labels(item.labels, pools)
    quality = {pool: label.quality for pool, label in preferred.items() if label.quality is not None}
    claimed = tuple(pool for pool, label in preferred.items() if is_client_claim(record, label.source))
    served_alone = set(quality) == {record.pool} and len(pools) > 1
    open_to_all = not record.pools or set(record.pools) >= set(pools)  # else some pool never could have served
    inverse = min(clip, 1.0 / record.propensity) if served_alone and record.free and open_to_all else 1.0
    return _LabelledPrompt(item, quality, {pool: float(np.mean(t)) for pool, t in tokens.items()}, claimed, inverse)


def _unweighted_if_complete(records: list[_LabelledPrompt], pools: tuple[str, ...]) -> list[_LabelledPrompt]:
    """Records of one prompt; if together they label every pool, none is weighted by inverse propensity."""
    complete = {pool for one in records for pool in one.quality} == set(pools)
    return [replace(one, inverse=1.0) for one in records] if complete else records


def _claim_factors(prompts: Sequence[Sequence[_LabelledPrompt]], share: float) -> dict[str, float]:
    """The factor on each key's claims, so that none makes up more than `share` of their weight before the cap.

    With fewer than 1 / share keys, each may make up an equal part.
    """
    weight: dict[str, float] = defaultdict(float)
    for records in prompts:
        for one in records:
            if one.claimed:
                weight[one.key] += one.inverse / len(records)
    cap = max(share, 1 / max(1, len(weight))) * sum(weight.values())
    return {key: min(1.0, cap / own) for key, own in weight.items()}


def _conversations(prompts: Sequence[Sequence[_LabelledPrompt]]) -> list[list[int]]:
    """The numbers of the conversations that each prompt occurred in; a number of its own where none is known."""
    named = [sorted({one.source.record.conversation for one in records} - {""}) for records in prompts]
    sizes = Counter(name for names in named for name in names)
    numbers = {name: number for number, name in enumerate(sizes)}
    most = max(2.0, COMMON_OPENING * len(prompts))
    return [
        [numbers[name] for name in names if sizes[name] <= most] or [len(numbers) + own]
        for own, names in enumerate(named)
    ]


def _groups(
    prompts: Sequence[Sequence[_LabelledPrompt]], conversations: Sequence[Sequence[int]], near: float
) -> NDArray[np.int64]:
    """Group numbers (N,): near-duplicates and turns of one conversation, which predict each other, are one group."""
    texts = [f"{records[0].source.context}\n{records[0].source.prompt}" for records in prompts]
    clusters = near_duplicate_clusters(texts, near).tolist()
    parent = list(range(len(prompts)))  # a union-find forest

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[int, int] = {}
    for number, (cluster, numbers) in enumerate(zip(clusters, conversations, strict=True)):
        for other in (cluster, *(first.setdefault(conversation, number) for conversation in numbers)):
            parent[root(number)] = root(other)
    return np.array([root(number) for number in range(len(prompts))], np.int64)


def _example(records: Sequence[_LabelledPrompt], pools: tuple[str, ...], factors: Mapping[str, float]) -> Example:
    """One example of the records of one prompt."""
    weights = [one.inverse * (factors[one.key] if one.claimed else 1.0) for one in records]
    newest = records[-1].source
    quality, tokens = (
        {
            pool: sum(w * labels[pool] for w, labels in known) / sum(w for w, _ in known)
            for pool in pools
            if (known := [(w, labels) for w, labels in zip(weights, of, strict=True) if pool in labels])
        }
        for of in ([one.quality for one in records], [one.token_confidence for one in records])
    )
    weight, task = sum(weights) / len(weights), newest.record.group
    return Example(newest.prompt, quality, tokens, weight, "", newest.context, task=task)
