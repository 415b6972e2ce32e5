"""Logged traffic as evaluation and calibration take it: texts, labels, propensities, and what was left out and why.

Nothing is merged or down-weighted here, as learning from the same records does: an estimate speaks of the traffic as
it came.

Shapes: N records, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy import make_url

from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Example, Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig
from depo_gateway.estimator.text import extract_text as text_of
from depo_gateway.training.evaluation.off_policy import Array, Integers, Logs
from depo_gateway.training.outcomes.label_precedence import believed

NEWEST = 20_000
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class Logged:
    """Records with a text, answered by one of the checkpoint's pools. N of them, oldest first."""

    source: str  # the database, without its password
    pools: tuple[str, ...]
    read: int  # records read, with those that can't be used at all
    texts: tuple[tuple[str, str], ...]  # (prompt, context)
    observed: Array  # (N, K) quality, NaN where there is no label
    token: Array  # (N, K) token confidence
    pool: Integers  # (N,) that served
    propensity: Array  # (N,)
    free: np.ndarray[tuple[int], np.dtype[np.bool_]]  # (N,) whether chance or scores chose, among all pools
    tokens: Array  # (N,) of prompt and answer; the mean where a record doesn't say
    conversation: Integers  # (N,) 0 to C - 1
    unused: Mapping[str, int]  # reason -> records that can't be used at all
    not_free: Mapping[str, int]  # reason -> records whose propensity says nothing

    def examples(self) -> list[Example]:
        """The prompts alone, without labels."""
        return [Example(prompt, {}, context=context) for prompt, context in self.texts]

    def logs(self, predicted: Array) -> Logs:
        """The free decisions, as estimates take them. `predicted`: quality (N, K) by a checkpoint."""
        keep = self.free
        numbers = np.unique(self.conversation[keep], return_inverse=True)[1]
        return Logs(self.pool[keep], self.propensity[keep], self.observed[keep], predicted[keep], numbers)


def add_source(parser: argparse.ArgumentParser, outcomes: str) -> None:
    """--outcomes or --records, and which of the records."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--outcomes", nargs="+", type=Path, metavar="FILE", help=outcomes)
    source.add_argument("--records", metavar="URL", help="the gateway's records.url: labelled traffic instead")
    parser.add_argument("--since", type=float, metavar="DAYS", help="--records: those of the last so many days")
    parser.add_argument(
        "--newest", type=int, default=NEWEST, metavar="N", help=f"--records: the newest N of them (default {NEWEST})"
    )


def check_source(args: argparse.Namespace) -> None:
    """Raises ValueError for numbers that can't be, and for flags of records beside outcome tables."""
    if args.since is not None and not args.since > 0:
        raise ValueError(f"--since is {args.since:g} days; it must be above 0")
    if args.newest < 1:
        raise ValueError(f"--newest is {args.newest}; it must be 1 or more")
    if args.records is None and args.since is not None:
        raise ValueError("--since goes with --records; outcome tables have no times")


def read(url: str, since_days: float | None, newest: int, pools: tuple[str, ...], text: TextConfig) -> Logged:
    """The newest records of a database. Raises ValueError where there is nothing in it to estimate from."""
    store = Store(url)
    file = make_url(url).database if url.startswith("sqlite") else None
    if file is not None and not Path(file).is_file():
        raise ValueError(f"{store.name}: no such file; --records takes what records.url says in gateway.yaml")
    try:
        if store.last_time() is None:
            raise ValueError(f"{store.name} holds no records")
        since = 0.0 if since_days is None else time.time() - since_days * DAY_SECONDS
        labelled = store.logged(newest, since)
        if not labelled:
            raise ValueError(f"{store.name} holds no records of the last {since_days:g} days; give a larger --since")
        return logged(labelled, pools, text, store.name)
    finally:
        store.close()


def logged(labelled: Sequence[Labelled], pools: tuple[str, ...], text: TextConfig, source: str) -> Logged:
    """Records -> Logged. Raises ValueError, one sentence, where none has a text, a label or one of `pools`."""
    if len(pools) < 2:
        raise ValueError("the checkpoint scores one pool; evaluating from records needs one that scores every pool")
    if all(item.record.asked is None for item in labelled):
        raise ValueError(
            f"none of the {len(labelled)} records in {source} keeps its text; set records.prompts: full in gateway.yaml"
            " (it stores what users write) and let traffic come in"
        )
    unused, not_free = Counter[str](), Counter[str]()
    kept: list[Labelled] = []
    for item in labelled:
        why = _unusable(item.record, pools)
        unused.update([why] if why else [])
        kept += [] if why else [item]
    if not kept:
        served = sorted({item.record.pool for item in labelled if item.record.pool})
        if served and not set(served) & set(pools):
            raise ValueError(
                f"the records' pools are {', '.join(served)}, the checkpoint's {', '.join(pools)}; take a checkpoint of"
                " the same pools"
            )
        raise ValueError(f"none of the {len(labelled)} records in {source} can be used: {counted(unused)}")
    qualities = [believed(item.labels, pools) for item in kept]
    if not any(qualities):
        raise ValueError(
            f"none of the {len(kept)} usable records in {source} has a label; send scores to /v1/feedback, or let"
            " depo-train refresh --follow shadow and judge some"
        )
    free = []
    for item in kept:
        why = _not_free(item.record, pools)
        not_free.update([why] if why else [])
        free.append(not why)
    conversations = [item.record.conversation or f"alone {number}" for number, item in enumerate(kept)]
    return Logged(
        source,
        pools,
        len(labelled),
        tuple(text_of(text, item.record.asked or "") for item in kept),
        _table(qualities, pools),
        _table([_token_confidence(item.labels) for item in kept], pools),
        np.array([pools.index(item.record.pool) for item in kept], np.int64),
        np.array([item.record.propensity for item in kept], float),
        np.array(free, bool),
        _tokens([item.record for item in kept]),
        np.unique(np.array(conversations, dtype=object).astype(str), return_inverse=True)[1],
        dict(unused),
        dict(not_free),
    )


def counted(reasons: Mapping[str, int]) -> str:
    """ "3 sticky, 2 pinned"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def _unusable(record: Record, pools: tuple[str, ...]) -> str:
    if not record.pool or record.status != 200:
        return "not answered"
    if record.asked is None:
        return "without text"
    if record.pool not in pools:
        return "of a pool that the checkpoint does not know"
    return ""


def _not_free(record: Record, pools: tuple[str, ...]) -> str:
    if not record.free:
        return record.reason or "without a reason"
    if set(record.pools) != set(pools):
        return "with another set of eligible pools"
    return ""


def _token_confidence(labels: Sequence[Label]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for label in labels:
        if label.token_confidence is not None:
            values[label.pool].append(label.token_confidence)
    return {pool: sum(known) / len(known) for pool, known in values.items()}


def _table(rows: Sequence[Mapping[str, float]], pools: tuple[str, ...]) -> Array:
    return np.array([[row.get(pool, np.nan) for pool in pools] for row in rows], float)


def _tokens(records: Sequence[Record]) -> Array:
    """(N,) tokens of prompt and answer, 1 each where no record says."""
    known = np.array(
        [np.nan if r.prompt_tokens is None else r.prompt_tokens + (r.completion_tokens or 0) for r in records]
    )
    if np.isnan(known).all() or not np.nansum(known):
        return np.ones(len(records))
    return np.where(np.isnan(known), np.nanmean(known), known)
