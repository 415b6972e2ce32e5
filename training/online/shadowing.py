"""Shadowing: asks the pools that did not serve a record for their answers, and has all answers judged.

The learner does so after serving and at low priority, so that serving never waits for it. Labels are written before the
record is marked, and a label overwrites one of the same record, pool and source. So a kill at any point costs work, and
never leaves a wrong or a duplicate label.
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
from depo_gateway.training.judging.label_sources import can_judge
from depo_gateway.training.judging.openai_client import NoAnswerError, together
from depo_gateway.training.judging.pool_client import PoolClient, Reply
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.online.settings import ShadowConfig
from depo_gateway.training.online.spend_ledger import SpendLedger, Spent

SHADOW_POLL_SECONDS = 1.0  # between checks for new records, and of the reasons to pause
RECORDS_BATCH = 200  # records read at once
MOST_FAILURES = 3  # of one record, while others succeed; then it is given up
RETRY_SECONDS = 30.0  # before a record that failed is tried again
OUTAGE_FAILURES = 3  # in a row, of any records: the pools or the judge are unreachable
LONGEST_SHADOW_WAIT_SECONDS = 60.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedRecord:
    """A record that failed, to be tried again."""

    failures: int  # counted only if others succeeded since the one before
    done_before: int  # records that had succeeded by then
    retry_at: float  # by the clock


class Shadow:
    """The loop that shadows records: it reads new ones, asks the pools, has answers judged, writes labels.

    Args:
        judge: see judges.py.
        kind: judge.kind, which is the source of the labels.
        heartbeat: called on each pass of the loop.
        ledger: what was spent before, also by the process before this one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        pools: PoolClient,
        judge: Judge,
        kind: str,
        config: ShadowConfig,
        metrics: LearnerMetrics,
        ledger: SpendLedger,
        heartbeat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._pools, self._judge, self._kind = store, pools, judge, kind
        self._config, self._metrics, self._heartbeat, self._clock = config, metrics, heartbeat, clock
        self._queue: deque[Record] = deque()
        self._running: dict[int, asyncio.Task[None]] = {}  # by the record's seq
        self._failed: dict[int, FailedRecord] = {}  # by the record's seq
        self._database_down = False  # at the last attempt
        self._done = 0
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self._ledger = ledger
        self._counted = Spent(0, pools.spent_tokens, pools.spent)  # of the pools' spending, what the ledger has
        self._day_spent = False  # a cap of the day was reached, and the log says so
        self._ledger_failed = False

    async def run(self) -> None:
        """Runs until it is cancelled."""
        try:
            while True:
                self._heartbeat()
                started = await self._start() if len(self._running) < self._config.max_concurrent else 0
                if self._running:
                    await asyncio.wait(
                        self._running.values(), timeout=SHADOW_POLL_SECONDS, return_when="FIRST_COMPLETED"
                    )
                elif not started:
                    await asyncio.sleep(SHADOW_POLL_SECONDS)
                self._reap()
                await self._account()
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            await self._account()

    async def _start(self) -> int:
        """Starts as many records as max_concurrent allows, unless shadowing is paused."""
        if await self._paused() or not await self._fill_queue():
            return 0
        started = 0
        while self._queue and len(self._running) < self._config.max_concurrent and not self._day_is_spent():
            record = self._queue.popleft()
            self._ledger.add(Spent(records=1))
            self._running[record.seq] = asyncio.create_task(self._shadow(record))
            started += 1
        return started

    async def _paused(self) -> bool:
        await self._account()
        now = self._clock()
        cap, most = self._config.cost_per_hour, self._config.busy_waiting
        reasons = {"cost": cap is not None and self._ledger.this_hour.cost >= cap, "day": self._day_is_spent()}
        reasons["unreachable"] = now < self._retry_at
        reasons["busy"] = False
        if most is not None and not any(reasons.values()):
            waiting = await asyncio.gather(*(self._pools.waiting(pool) for pool in self._pools.pools))
            reasons["busy"] = max(waiting) > most
        for reason, holds in reasons.items():
            self._metrics.shadow_paused.labels(reason).set(holds)
        return any(reasons.values())

    def _day_is_spent(self) -> bool:
        """Whether a daily cap is reached; the log says so once, and once when the next day begins."""
        spent, config = self._ledger.today, self._config
        caps = (
            ("records", spent.records, config.records_per_day),
            ("tokens", spent.tokens, config.tokens_per_day),
            ("cost", spent.cost, config.cost_per_day),
        )
        reached = [(name, used, most) for name, used, most in caps if most is not None and used >= most]
        if reached and not self._day_spent:
            name, used, most = reached[0]
            log.warning("shadowing pauses until midnight UTC: today's %s, %g, reach shadow.%s_per_day: %g", name, used,
                        name, most)  # fmt: skip
        elif self._day_spent and not reached:
            log.info("shadowing continues: a new day has begun")
        self._day_spent = bool(reached)
        return self._day_spent

    async def _account(self) -> None:
        """Puts what the pools' calls have spent into the ledger, onto the disk and into the metrics."""
        total = Spent(0, self._pools.spent_tokens, self._pools.spent)
        fresh = Spent(0, total.tokens - self._counted.tokens, total.cost - self._counted.cost)
        self._counted = total
        self._ledger.add(fresh)
        self._metrics.show_spending(fresh.tokens, self._ledger.today)
        try:
            await asyncio.to_thread(self._ledger.save)
            self._ledger_failed = False
        except OSError as error:
            if not self._ledger_failed:
                log.warning("today's spending is not saved, so a restart would forget it: %s: %s", error.filename,
                            error.strerror)  # fmt: skip
            self._ledger_failed = True
            self._metrics.errors.labels("disk").inc()

    async def _fill_queue(self) -> bool:
        """Whether there is a record to start. Records outside the share are marked as they are read."""
        while not self._queue:
            since = time.time() - self._config.max_age_hours * 3600
            pending = {*self._running, *self._failed}
            try:
                records = await asyncio.to_thread(self._store.unshadowed, RECORDS_BATCH + len(pending), since)
                skipped = [record.seq for record in records if not in_shadow_share(record, self._config.share)]
                await asyncio.to_thread(self._store.mark_shadowed, skipped, time.time())
            except StoreError as error:
                self._store_failed(error)
                return False
            self._store_works()
            self._metrics.shadowed.labels("passed").inc(len(skipped))
            now, unmarked = self._clock(), {record.seq for record in records}
            self._failed = {seq: failed for seq, failed in self._failed.items() if seq in unmarked}
            self._queue.extend(
                record
                for record in records
                if in_shadow_share(record, self._config.share)
                and record.seq not in self._running
                and (record.seq not in self._failed or now >= self._failed[record.seq].retry_at)
            )
            self._heartbeat()
            if not skipped:  # all that is left is in progress, or failed a moment ago
                break
        return bool(self._queue)

    async def _shadow(self, record: Record) -> None:
        """Shadows one record: labels it and marks it."""
        try:
            labels = await self.labels_of(record)
        except NoAnswerError as error:
            if not self._give_up(record, error):
                return
            labels = []
        else:
            self._done += 1
            self._failures = 0
            self._metrics.shadowed.labels("done").inc()
            self._failed.pop(record.seq, None)
        wait = SHADOW_POLL_SECONDS
        while True:
            try:
                await asyncio.to_thread(self._write, record, labels)
                break
            except StoreError as error:  # the answers are paid for, so they wait for the database
                self._store_failed(error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_SHADOW_WAIT_SECONDS)
        self._metrics.labels.labels(self._kind).inc(len(labels))

    async def labels_of(self, record: Record) -> list[Label]:
        """The labels of one record, by pools and judge. Raises NoAnswerError where one of them does not answer."""
        assert record.asked is not None  # the store gives no others
        query = record.asked
        served = record.answer if record.answer and record.finish_reason else None  # else incomplete, or tool calls
        pools = {pool for pool in self._pools.pools if pool != record.pool}
        judgeable = can_judge(self._kind, record)
        if record.pool in self._pools.pools and (self._config.confidence_of_served or (judgeable and served is None)):
            pools.add(record.pool)
        names = sorted(pools)
        results = await together(
            *(self._pools.ask(pool, query, record.parameters, self._config.max_tokens) for pool in names)
        )
        replies: dict[str, Reply] = {
            pool: reply for pool, reply in zip(names, results, strict=True) if reply is not None
        }
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

    def _give_up(self, record: Record, error: NoAnswerError) -> bool:
        """Notes the failure. True: the record is given up, because it keeps failing while others succeed."""
        before = self._failed.get(record.seq, FailedRecord(0, -1, 0.0))
        failures = before.failures + (self._done > before.done_before)
        self._failures += 1
        now = self._clock()
        if self._failures >= OUTAGE_FAILURES:
            self._retry_at = now + min(LONGEST_SHADOW_WAIT_SECONDS, 2.0 ** min(self._failures, 10))
        if failures >= MOST_FAILURES:
            log.warning("gave up shadowing record %d: %s", record.seq, error)
            self._failed.pop(record.seq, None)
            self._metrics.shadowed.labels("given_up").inc()
            return True
        log.warning("%s; record %d will be tried again", error, record.seq)
        self._metrics.errors.labels("shadow").inc()
        self._failed[record.seq] = FailedRecord(failures, self._done, now + RETRY_SECONDS)
        return False

    def _store_works(self) -> None:
        if self._database_down:
            log.info("the records database is back; shadowing continues")
        self._database_down = False
        self._metrics.shadow_paused.labels("records").set(0)

    def _store_failed(self, error: StoreError) -> None:
        if not self._database_down:
            log.warning("%s; shadowing waits for the database", error)
        self._database_down = True
        self._metrics.errors.labels("records").inc()
        self._metrics.shadow_paused.labels("records").set(1)

    def _reap(self) -> None:
        for seq, task in list(self._running.items()):
            if task.done():
                del self._running[seq]
                task.result()  # a defect of this program ends the learner


def in_shadow_share(record: Record, share: float) -> bool:
    """Whether a record belongs to the share that is shadowed: by a hash of its id and number, the same after a restart.

    The number comes from the store, so no client can choose an id that is shadowed.
    """
    digest = hashlib.sha256(f"{record.seq} {record.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
