"""Shadowing: what would the pools not used have answered, and how good would that have been?

The learner asks them itself, after the fact and at low priority, so that serving never waits for it. Labels are
written before the record is marked, and a label overwrites its like: a kill at any point costs work, and never leaves
a wrong or a second label.
"""

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depo_gateway.estimator.records.store import Store, StoreError
from depo_gateway.estimator.records.types import Label, Record
from depo_gateway.training.judging.judges import Judge
from depo_gateway.training.judging.pool_client import AskFailed, PoolClient, Reply, together
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.online.settings import JudgeKind, ShadowConfig

POLL_SECONDS = 1.0  # between looks for new records, or at what pauses shadowing
BATCH = 200  # records read at once
GIVE_UP = 3  # failures of a record, others going well meanwhile
AGAIN_SECONDS = 30.0  # before a record that failed is tried again
FAILURES = 3  # in a row, of any records: the pools, or the judge, are away
LONGEST_WAIT_SECONDS = 60.0
HOUR_SECONDS = 3600.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tried:
    """A record that failed."""

    times: int  # counted only where others went well since the time before
    done_then: int  # records that had gone well by then
    again: float  # when, by the clock


class Shadow:
    """Takes records that are not yet shadowed, asks, judges, labels, marks.

    Args:
        judge: see judges.py. `kind` names it, as the labels' source.
        beat: called at each turn of the loop.
        clock: monotonic seconds. The hour of `cost_per_hour` begins with this object, and with each restart.
    """

    def __init__(
        self,
        store: Store,
        pools: PoolClient,
        judge: Judge,
        kind: JudgeKind,
        config: ShadowConfig,
        metrics: LearnerMetrics,
        beat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._pools, self._judge, self._kind = store, pools, judge, kind
        self._config, self._metrics, self._beat, self._clock = config, metrics, beat, clock
        self._queue: deque[Record] = deque()
        self._running: dict[int, asyncio.Task[None]] = {}  # by the record's seq
        self._tried: dict[int, Tried] = {}
        self._away = False  # the database, at the last look
        self._done = 0
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self._hour_began, self._spent_before = clock(), pools.spent

    async def run(self) -> None:
        """For ever, until it is cancelled."""
        try:
            while True:
                self._beat()
                started = await self._start() if len(self._running) < self._config.max_concurrent else 0
                if self._running:
                    await asyncio.wait(self._running.values(), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                elif not started:
                    await asyncio.sleep(POLL_SECONDS)
                self._reap()
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _start(self) -> int:
        """Begins as many records as there is room for, unless something speaks against it."""
        if await self._paused() or not await self._filled():
            return 0
        started = 0
        while self._queue and len(self._running) < self._config.max_concurrent:
            record = self._queue.popleft()
            self._running[record.seq] = asyncio.create_task(self._one(record))
            started += 1
        return started

    async def _paused(self) -> bool:
        now = self._clock()
        if now - self._hour_began >= HOUR_SECONDS:
            self._hour_began, self._spent_before = now, self._pools.spent
        cap, most = self._config.cost_per_hour, self._config.busy_waiting
        reasons = {"cost": cap is not None and self._pools.spent - self._spent_before >= cap}
        reasons["unreachable"] = now < self._retry_at
        reasons["busy"] = False
        if most is not None and not any(reasons.values()):
            waiting = await asyncio.gather(*(self._pools.waiting(pool) for pool in self._pools.pools))
            reasons["busy"] = max(waiting) > most
        for reason, holds in reasons.items():
            self._metrics.shadow_paused.labels(reason).set(holds)
        return any(reasons.values())

    async def _filled(self) -> bool:
        """Whether there is a record to begin. Those outside the share are marked as they are met."""
        while not self._queue:
            since = time.time() - self._config.max_age_hours * 3600
            known = {*self._running, *self._tried}
            try:
                found = await asyncio.to_thread(self._store.unshadowed, BATCH + len(known), since)
                passed = [record.seq for record in found if not chosen(record, self._config.share)]
                await asyncio.to_thread(self._store.mark_shadowed, passed, time.time())
            except StoreError as error:
                self._store_failed(error)
                return False
            self._store_answers()
            self._metrics.shadowed.labels("passed").inc(len(passed))
            now, there = self._clock(), {record.seq for record in found}
            self._tried = {seq: tried for seq, tried in self._tried.items() if seq in there}
            self._queue.extend(
                record
                for record in found
                if chosen(record, self._config.share)
                and record.seq not in self._running
                and (record.seq not in self._tried or now >= self._tried[record.seq].again)
            )
            self._beat()
            if not passed:  # what is left is under way, or failed a moment ago
                break
        return bool(self._queue)

    async def _one(self, record: Record) -> None:
        """One record from its question to its mark."""
        try:
            labels = await self.labels_of(record)
        except AskFailed as error:
            if not self._failed(record, error):
                return
            labels = []
        else:
            self._done += 1
            self._failures = 0
            self._metrics.shadowed.labels("done").inc()
            self._tried.pop(record.seq, None)
        wait = POLL_SECONDS
        while True:
            try:
                await asyncio.to_thread(self._write, record, labels)
                break
            except StoreError as error:  # what was paid for is kept until the database is back
                self._store_failed(error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        self._metrics.labels.labels(self._kind).inc(len(labels))

    async def labels_of(self, record: Record) -> list[Label]:
        """What the pools and the judge say of one record. AskFailed where one of them does not answer."""
        assert record.asked is not None  # the store gives no others
        asked = record.asked
        served = record.answer if record.answer and record.finish_reason else None  # else it was broken off, or tools'
        ask = {pool for pool in self._pools.pools if pool != record.pool}
        judged = self._kind in ("model", "webhook") or (self._kind != "none" and record.reference is not None)
        if record.pool in self._pools.pools and (self._config.confidence_of_served or (judged and served is None)):
            ask.add(record.pool)
        names = sorted(ask)
        found = await together(
            *(self._pools.ask(pool, asked, record.parameters, self._config.max_tokens) for pool in names)
        )
        replies: dict[str, Reply] = {pool: reply for pool, reply in zip(names, found, strict=True) if reply is not None}
        answers = {pool: reply.text for pool, reply in replies.items() if reply.text and not reply.cut}
        if served is not None and record.pool:
            answers[record.pool] = served
        quality = await self._judge(record, {pool: answers[pool] for pool in sorted(answers)})
        confidence = {pool: reply.token_confidence for pool, reply in replies.items()}
        now = time.time()
        return [
            Label(record.seq, pool, self._kind, quality.get(pool), confidence.get(pool), now)
            for pool in sorted({*quality, *confidence})
            if quality.get(pool) is not None or confidence.get(pool) is not None
        ]

    def _write(self, record: Record, labels: Sequence[Label]) -> None:
        self._store.add_labels(labels)
        self._store.mark_shadowed([record.seq], time.time())

    def _failed(self, record: Record, error: AskFailed) -> bool:
        """Notes the failure; True: the record is given up, for it keeps failing while others go well."""
        before = self._tried.get(record.seq, Tried(0, -1, 0.0))
        times = before.times + (self._done > before.done_then)
        self._failures += 1
        now = self._clock()
        if self._failures >= FAILURES:
            self._retry_at = now + min(LONGEST_WAIT_SECONDS, 2.0 ** min(self._failures, 10))
        if times >= GIVE_UP:
            log.warning("record %d is given up: %s", record.seq, error)
            self._tried.pop(record.seq, None)
            self._metrics.shadowed.labels("given_up").inc()
            return True
        log.warning("%s; record %d is tried again", error, record.seq)
        self._metrics.errors.labels("shadow").inc()
        self._tried[record.seq] = Tried(times, self._done, now + AGAIN_SECONDS)
        return False

    def _store_answers(self) -> None:
        if self._away:
            log.info("the records database is back; shadowing goes on")
        self._away = False
        self._metrics.shadow_paused.labels("records").set(0)

    def _store_failed(self, error: StoreError) -> None:
        if not self._away:
            log.warning("%s; shadowing waits", error)
        self._away = True
        self._metrics.errors.labels("records").inc()
        self._metrics.shadow_paused.labels("records").set(1)

    def _reap(self) -> None:
        for seq, task in list(self._running.items()):
            if task.done():
                del self._running[seq]
                task.result()  # a mistake of ours ends the learner, loudly


def chosen(record: Record, share: float) -> bool:
    """Whether a record is of the share that is shadowed: by its id and number, so that a restart decides alike.

    The number is the store's, so no client can choose an id that is.
    """
    digest = hashlib.sha256(f"{record.seq} {record.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
