"""Logged traffic for evaluation and calibration: texts, labels, propensities, and what was left out and why.

Unlike learning from the same records, nothing is merged or down-weighted here: an estimate is about the traffic as it
was.

Shapes: N records, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from sqlalchemy import make_url

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Example, Label, Labelled, Record
from depo_gateway.estimator.text import TextConfig
from depo_gateway.estimator.text import extract_text as text_of
from depo_gateway.training.evaluation.off_policy import Integers, Logs
from depo_gateway.training.outcomes.label_precedence import preferred_qualities

DEFAULT_NEWEST = 20_000
DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True)
class LoggedTraffic:
    """N records with a text, answered by one of the checkpoint's pools, oldest first."""

    source: str  # the database, without its password
    pools: tuple[str, ...]
    records: tuple[Record, ...]  # (N,) as they were read, for routing_in_force.py
    read: int  # records read, including those that cannot be used at all
    texts: tuple[tuple[str, str], ...]  # (prompt, context)
    observed: Array  # (N, K) quality, NaN where there is no label
    token: Array  # (N, K) token confidence
    pool: Integers  # (N,) that served
    propensity: Array  # (N,)
    free: np.ndarray[tuple[int], np.dtype[np.bool_]]  # (N,) whether random choice or scores chose, among all pools
    tokens: Array  # (N,) of prompt and answer; the mean where a record has no count
    conversation: Integers  # (N,) 0 to C - 1
    unused: Mapping[str, int]  # reason -> records that cannot be used at all
    not_free: Mapping[str, int]  # reason -> records whose propensity is not meaningful

    @property
    def groups(self) -> tuple[str, ...]:
        """(N,) the names of the prompts' tasks, as the gateway told them to its estimator."""
        return tuple(record.group for record in self.records)

    def examples(self) -> list[Example]:
        """The prompts, without labels."""
        return [
            Example(prompt, {}, context=context, task=group)
            for (prompt, context), group in zip(self.texts, self.groups, strict=True)
        ]

    def logs(self, predicted: Array) -> Logs:
        """The free decisions, for off-policy estimates. `predicted`: quality (N, K) by a checkpoint."""
        free = self.free
        numbers = np.unique(self.conversation[free], return_inverse=True)[1]
        unfamiliar = np.array([record.reason == Reason.UNFAMILIAR for record in self.records], bool)[free]
        return Logs(self.pool[free], self.propensity[free], self.observed[free], predicted[free], numbers, unfamiliar)

    def select(self, rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> LoggedTraffic:
        """The records in `rows` (N,), their conversations renumbered."""
        arrays = ("observed", "token", "pool", "propensity", "free", "tokens")
        records, texts = tuple(compress(self.records, rows.tolist())), tuple(compress(self.texts, rows.tolist()))
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in arrays},
            records=records,
            texts=texts,
            conversation=np.unique(self.conversation[rows], return_inverse=True)[1],
            not_free=_count_not_free(records, self.pools),
        )


def add_source_arguments(parser: argparse.ArgumentParser, outcomes: str) -> None:
    """Adds --outcomes (with help `outcomes`) and --records, of which one is required, and the flags of each."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--outcomes", nargs="+", type=Path, metavar="FILE", help=outcomes)
    source.add_argument("--records", metavar="URL", help="use labelled traffic: the gateway's records.url")
    parser.add_argument("--since", type=float, metavar="DAYS", help="with --records: only the last DAYS days")
    parser.add_argument(
        "--newest",
        type=int,
        default=DEFAULT_NEWEST,
        metavar="N",
        help=f"with --records: only the newest N (default {DEFAULT_NEWEST})",
    )
    parser.add_argument(
        "--groups",
        action="store_true",
        help="with --outcomes: score like a gateway that knows each prompt's group (routing.group), by the table's"
        " `group`",
    )


def check_source_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for invalid numbers, and for flags of one source used with the other."""
    if args.since is not None and not args.since > 0:
        raise ValueError(f"--since is {args.since:g} days; it must be above 0")
    if args.newest < 1:
        raise ValueError(f"--newest is {args.newest}; it must be 1 or more")
    if args.records is None and args.since is not None:
        raise ValueError("--since goes with --records; outcome tables have no times")
    if args.records is not None and args.groups:
        raise ValueError("--groups goes with --outcomes; a record's group is always told, as the gateway told it")


def read_traffic(
    url: str, since_days: float | None, newest: int, pools: tuple[str, ...], text: TextConfig
) -> LoggedTraffic:
    """The newest records of a database. Raises ValueError where it holds nothing to estimate from."""
    store = Store(url)
    file = make_url(url).database if url.startswith("sqlite") else None
    if file is not None and not Path(file).is_file():
        raise ValueError(f"{store.name}: no such file; --records takes the value of records.url in gateway.yaml")
    try:
        if store.last_time() is None:
            raise ValueError(f"{store.name} holds no records")
        since = 0.0 if since_days is None else time.time() - since_days * DAY_SECONDS
        labelled = store.logged(newest, since)
        if not labelled:
            raise ValueError(f"{store.name} holds no records of the last {since_days:g} days; give a larger --since")
        return traffic_of(labelled, pools, text, store.name)
    finally:
        store.close()


def traffic_of(labelled: Sequence[Labelled], pools: tuple[str, ...], text: TextConfig, source: str) -> LoggedTraffic:
    """LoggedTraffic of records with labels. Raises ValueError where none has a text, a label or one of `pools`."""
    usable, unused = _usable_records(labelled, pools, source)
    qualities = [preferred_qualities(item.labels, pools) for item in usable]
    if not any(qualities):
        raise ValueError(
            f"none of the {len(usable)} usable records in {source} has a label; send scores to /v1/feedback, or let"
            " depo-train refresh --follow shadow and judge some"
        )
    reasons = [_not_free(item.record, pools) for item in usable]
    conversations = [item.record.conversation or f"alone {number}" for number, item in enumerate(usable)]
    return LoggedTraffic(
        source,
        pools,
        tuple(item.record for item in usable),
        len(labelled),
        tuple(text_of(text, item.record.asked or "") for item in usable),
        _table(qualities, pools),
        _table([_token_confidence(item.labels) for item in usable], pools),
        np.array([pools.index(item.record.pool) for item in usable], np.int64),
        np.array([item.record.propensity for item in usable], float),
        np.array([not reason for reason in reasons], bool),
        record_tokens([item.record for item in usable]),
        np.unique(np.array(conversations, dtype=object).astype(str), return_inverse=True)[1],
        unused,
        _count_not_free([item.record for item in usable], pools),
    )


def reason_counts(reasons: Mapping[str, int]) -> str:
    """ "3 sticky, 2 pinned", the most frequent reason first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def _usable_records(
    labelled: Sequence[Labelled], pools: tuple[str, ...], source: str
) -> tuple[list[Labelled], dict[str, int]]:
    """The records that can be used, and how many cannot, by reason. Raises ValueError, with the remedy, if none can."""
    if len(pools) < 2:
        raise ValueError("the checkpoint scores one pool; evaluating from records needs one that scores every pool")
    if all(item.record.asked is None for item in labelled):
        raise ValueError(
            f"none of the {len(labelled)} records in {source} has its text; set records.prompts: full in gateway.yaml"
            " (it stores what users write) and collect new traffic"
        )
    reasons = [_unusable(item.record, pools) for item in labelled]
    unused = dict(Counter(filter(None, reasons)))
    usable = [item for item, reason in zip(labelled, reasons, strict=True) if not reason]
    if usable:
        return usable, unused
    served = sorted({item.record.pool for item in labelled if item.record.pool})
    if served and not set(served) & set(pools):
        raise ValueError(
            f"the records' pools are {', '.join(served)}, the checkpoint's {', '.join(pools)}; take a checkpoint of"
            " the same pools"
        )
    raise ValueError(f"none of the {len(labelled)} records in {source} can be used: {reason_counts(unused)}")


def _unusable(record: Record, pools: tuple[str, ...]) -> str:
    if not record.pool or record.status != 200:
        return "not answered"
    if record.asked is None:
        return "without text"
    if record.pool not in pools:
        return "of a pool that the checkpoint does not score"
    return ""


def _count_not_free(records: Sequence[Record], pools: tuple[str, ...]) -> dict[str, int]:
    return dict(Counter(filter(None, (_not_free(record, pools) for record in records))))


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


def record_tokens(records: Sequence[Record]) -> Array:
    """(N,) tokens of prompt and answer; 1 each where no record has a count."""
    known = np.array(
        [np.nan if r.prompt_tokens is None else r.prompt_tokens + (r.completion_tokens or 0) for r in records]
    )
    if np.isnan(known).all() or not np.nansum(known):
        return np.ones(len(records))
    return np.where(np.isnan(known), np.nanmean(known), known)
