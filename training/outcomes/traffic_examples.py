"""Served traffic -> Examples: which labels are believed, and how much each counts. Pure.

Of a record's labels, those of the source that labels the most pools are taken, since qualities of pools are compared
and two sources' scales differ. Among equals verifiers come first (exact, math), then feedback, webhook, model. Pools
that this source leaves out take the next one's.

Weights. A label of the served pool alone, on a decision that scores or chance made, stands for all prompts that could
have been served there: it weighs 1 / propensity, clipped. Labels of every pool (shadowing) and labels on decisions that
were not free (sticky, fallback, budget, pinned) weigh 1. Records of the same prompt share one weight, and their labels
are averaged by it. What a key says of itself (feedback, and verdicts by a reference that the client gave) is capped:
no key makes up more than a share of it.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.records.types import FEEDBACK, Example, Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.online.refresh_config import TrafficConfig
from depo_gateway.training.outcomes.label_precedence import VERIFIERS, _rank
from depo_gateway.training.outcomes.near_duplicates import clusters
from depo_gateway.training.outcomes.table import key_of

SAME_LABEL = 0.1  # labels of a burst differ by no more than about this
COMMON = 0.1  # of all prompts: what more of them begin with is a greeting or a template, and no conversation


@dataclass(frozen=True, slots=True)
class Told:
    """A key's own word on one pool's answer, and the example that it went into."""

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
    together: NDArray[np.int64]  # (N,) near-same texts and turns of one conversation have the same number
    conversation: NDArray[np.int64]  # (N,) turns of one conversation have the same number
    told: tuple[Told, ...]
    notes: tuple[str, ...]  # what was left out or weighs less, and why
    trained_to: int  # the highest seq of any label


@dataclass(frozen=True, slots=True)
class _Asked:
    """A usable record, its text, and the labels of it that are believed."""

    record: Record
    labels: tuple[Label, ...]  # of these pools
    prompt: str
    context: str


@dataclass(frozen=True, slots=True)
class _Merged:
    """A record's one label a pool."""

    asked: _Asked
    quality: Mapping[str, float]
    token_confidence: Mapping[str, float]
    told: tuple[str, ...]  # pools whose label is the key's own word
    inverse: float


def examples_of_traffic(
    labelled: Sequence[Labelled],
    pools: tuple[str, ...],
    text: TextConfig,
    config: TrafficConfig,
    distrusted: Collection[str] = (),
) -> Traffic:
    """Records with a text, status 200 and a quality label of one of `pools` -> what is learned from, oldest first.

    Args:
        distrusted: keys whose own word counts for nothing; a judge's labels on their requests still count.
    """
    usable = _usable(labelled, pools, text, distrusted)
    usable, notes = _without_bursts(usable, config)
    same: dict[tuple[str, str], list[_Merged]] = defaultdict(list)
    for asked in usable:
        same[key_of(asked.prompt), asked.context].append(_merged(asked, pools, config.clip))
    groups = sorted((_joined(group, pools) for group in same.values()), key=lambda group: group[-1].asked.record.time)
    factors = _factors(groups, config.key_share)
    notes += [
        f"the word of key {key!r} weighs {factor:.2f} of what it did: it made up too much of all feedback"
        for key, factor in sorted(factors.items())
        if factor < 1
    ]
    newest = [group[-1].asked.record for group in groups]
    conversations = _conversations(groups)
    return Traffic(
        pools=pools,
        examples=tuple(_example(group, pools, factors) for group in groups),
        times=np.array([record.time for record in newest], float),
        keys=tuple(record.key for record in newest),
        records=tuple(record.seq for record in newest),
        served=np.array([pools.index(r.pool) if r.pool in pools else -1 for r in newest], np.int64),
        inverse=np.array([np.mean([one.inverse for one in group]) for group in groups], float),
        oldest_label=np.array([min(x.seq for m in group for x in m.asked.labels) for group in groups], np.int64),
        together=_together(groups, conversations, config.near),
        conversation=np.array([numbers[0] for numbers in conversations], np.int64),
        told=tuple(
            Told(number, one.asked.record.key, pools.index(pool), one.quality[pool])
            for number, group in enumerate(groups)
            for one in group
            for pool in one.told
        ),
        notes=tuple(notes),
        trained_to=max((label.seq for item in labelled for label in item.labels), default=0),
    )


def kept_in_bounds(traffic: Traffic, like: Array, share: float) -> Array:
    """What weights are multiplied by besides `like` (N,), so that no key gains more than `share` of all that keys say
    by the others' labels counting for less: who brings a new topic alone does not take over.
    """
    before, after = defaultdict[str, float](float), defaultdict[str, float](float)
    times = Counter(one.example for one in traffic.told)
    for one in traffic.told:
        weight = traffic.examples[one.example].weight / times[one.example]
        before[one.key] += weight
        after[one.key] += weight * float(like[one.example])
    whole, left = sum(before.values()), sum(after.values())
    least = max(share, 1 / max(1, len(after)))
    factors = {
        key: min(1.0, max(least, before[key] / whole) * left / own) if own > 0 else 1.0 for key, own in after.items()
    }
    found = np.ones(len(like))
    for one in traffic.told:
        found[one.example] -= (1.0 - factors[one.key]) / times[one.example]
    return found


def _usable(
    labelled: Sequence[Labelled], pools: tuple[str, ...], text: TextConfig, distrusted: Collection[str]
) -> list[_Asked]:
    found = []
    for item in sorted(labelled, key=lambda item: (item.record.time, item.record.seq)):
        record = item.record
        if record.asked is None or record.status != 200:
            continue
        labels = tuple(
            label
            for label in item.labels
            if label.pool in pools and not (record.key in distrusted and _own_word(record, label))
        )
        if not any(label.quality is not None for label in labels):
            continue
        prompt, context = extract_text(text, record.asked)
        if prompt.strip():
            found.append(_Asked(record, labels, prompt, context))
    return found


def _own_word(record: Record, label: Label) -> bool:
    """Whether a label rests on what the key itself said."""
    return label.source == FEEDBACK or (label.source in VERIFIERS and record.reference is not None)


def _without_bursts(usable: list[_Asked], config: TrafficConfig) -> tuple[list[_Asked], list[str]]:
    """Without the word of keys that said the same of near-same prompts `burst` times within `burst_seconds`."""
    near = clusters([asked.prompt for asked in usable], config.near)
    said: dict[tuple[str, int, str, int], list[int]] = defaultdict(list)
    for number, asked in enumerate(usable):
        for label in asked.labels:
            if label.quality is not None and _own_word(asked.record, label):
                level = round(label.quality / SAME_LABEL)
                said[asked.record.key, int(near[number]), label.pool, level].append(number)
    bursting: dict[str, set[int]] = defaultdict(set)
    for (key, *_), numbers in said.items():
        times = np.array([usable[number].record.time for number in numbers])  # rising
        for start in range(len(numbers) - config.burst + 1):
            if times[start + config.burst - 1] - times[start] <= config.burst_seconds:
                bursting[key].update(numbers[start : start + config.burst])
    out = {number for numbers in bursting.values() for number in numbers}
    kept = []
    for number, asked in enumerate(usable):
        labels = asked.labels
        if number in out:
            labels = tuple(label for label in labels if not _own_word(asked.record, label))
        if any(label.quality is not None for label in labels):
            kept.append(_Asked(asked.record, labels, asked.prompt, asked.context))
    notes = [
        f"{len(numbers)} records of key {key!r} are a burst of near-same prompts and labels: its word there is left out"
        for key, numbers in sorted(bursting.items())
    ]
    return kept, notes


def _merged(asked: _Asked, pools: tuple[str, ...], clip: float) -> _Merged:
    by_source: dict[str, dict[str, float]] = defaultdict(dict)
    tokens: dict[str, list[float]] = defaultdict(list)
    for label in asked.labels:
        if label.quality is not None:
            by_source[label.source][label.pool] = label.quality
        if label.token_confidence is not None:
            tokens[label.pool].append(label.token_confidence)
    quality: dict[str, float] = {}
    told = []
    for source in sorted(by_source, key=lambda source: (-len(by_source[source]), _rank(source), source)):
        own = source == FEEDBACK or (source in VERIFIERS and asked.record.reference is not None)
        for pool, value in by_source[source].items():
            if pool not in quality:
                quality[pool] = value
                told += [pool] if own else []
    record = asked.record
    alone = set(quality) == {record.pool} and len(pools) > 1
    open_to_all = not record.pools or set(record.pools) >= set(pools)  # else some pool never could have served
    inverse = min(clip, 1.0 / record.propensity) if alone and record.free and open_to_all else 1.0
    return _Merged(asked, quality, {pool: float(np.mean(t)) for pool, t in tokens.items()}, tuple(told), inverse)


def _joined(group: list[_Merged], pools: tuple[str, ...]) -> list[_Merged]:
    """Records of one prompt; where they label every pool between them, none stands for what was not served."""
    whole = {pool for one in group for pool in one.quality} == set(pools)
    return [replace(one, inverse=1.0) for one in group] if whole else group


def _factors(groups: Sequence[Sequence[_Merged]], share: float) -> dict[str, float]:
    """What each key's own word is multiplied by, so that none makes up more than `share` of the whole before the cap.

    Of fewer than 1 / share keys each may make up as much as an equal part; one alone all of it.
    """
    weight: dict[str, float] = defaultdict(float)
    for group in groups:
        for one in group:
            if one.told:
                weight[one.asked.record.key] += one.inverse / len(group)
    cap = max(share, 1 / max(1, len(weight))) * sum(weight.values())
    return {key: min(1.0, cap / own) for key, own in weight.items()}


def _conversations(groups: Sequence[Sequence[_Merged]]) -> list[list[int]]:
    """The numbers of the conversations that each prompt was asked in; a number of its own where none is known."""
    named = [sorted({one.asked.record.conversation for one in group} - {""}) for group in groups]
    sizes = Counter(name for names in named for name in names)
    numbers = {name: number for number, name in enumerate(sizes)}
    most = max(2.0, COMMON * len(groups))
    return [
        [numbers[name] for name in names if sizes[name] <= most] or [len(numbers) + own]
        for own, names in enumerate(named)
    ]


def _together(
    groups: Sequence[Sequence[_Merged]], conversations: Sequence[Sequence[int]], near: float
) -> NDArray[np.int64]:
    """What is held out together (N,): near-same texts, and the turns of a conversation, which tell of one another."""
    found = clusters([f"{group[0].asked.context}\n{group[0].asked.prompt}" for group in groups], near).tolist()
    above = list(range(len(groups)))  # a forest; roots stand for their trees

    def root(number: int) -> int:
        while above[number] != number:
            above[number] = above[above[number]]
            number = above[number]
        return number

    first: dict[int, int] = {}
    for number, (cluster, told_in) in enumerate(zip(found, conversations, strict=True)):
        for other in (cluster, *(first.setdefault(name, number) for name in told_in)):
            above[root(number)] = root(other)
    return np.array([root(number) for number in range(len(groups))], np.int64)


def _example(group: Sequence[_Merged], pools: tuple[str, ...], factors: Mapping[str, float]) -> Example:
    """One example of the records of one prompt."""
    weights = [one.inverse * (factors[one.asked.record.key] if one.told else 1.0) for one in group]
    newest = group[-1].asked
    quality, tokens = (
        {
            pool: sum(w * labels[pool] for w, labels in known) / sum(w for w, _ in known)
            for pool in pools
            if (known := [(w, labels) for w, labels in zip(weights, of, strict=True) if pool in labels])
        }
        for of in ([one.quality for one in group], [one.token_confidence for one in group])
    )
    return Example(newest.prompt, quality, tokens, sum(weights) / len(weights), "", newest.context)
